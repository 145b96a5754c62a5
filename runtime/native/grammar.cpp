// Which bytes may follow in a context-free grammar over bytes. A state is the set of all stacks that a text can have led
// to. States are made when they are first met and kept, with what each byte leads to, so that a vocabulary is walked at
// the speed of an automaton. Grammars come from clients: every loop counts what it does, and gives up beyond a bound.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "lazyneuron.h"

namespace {

enum kind : int32_t { END = 0, OR = 1, RULE = 2, SET = 3 };

constexpr int32_t DEAD = -1, TOO_MUCH = -2, UNKNOWN = -3;
constexpr int64_t MAX_STEP = 200000;      // elements looked at for one byte
constexpr int64_t MAX_CALL = 20000000;    // for one call
constexpr size_t MAX_ITEMS = 4096;        // stacks of a state
constexpr size_t MAX_STATES = 30000;      // 1 KiB each
constexpr size_t MAX_FRAMES = 1000000;
constexpr int32_t NO_FRAME = -1;

struct give_up {};

// What is left to match after a rule: the element to go on with, and what is left after that.
struct frame {
    int32_t at;
    int32_t rest;
    bool operator==(const frame & other) const { return at == other.at && rest == other.rest; }
};

uint64_t packed(int32_t at, int32_t rest) { return static_cast<uint64_t>(static_cast<uint32_t>(at)) << 32 | static_cast<uint32_t>(rest); }

struct state {
    std::vector<uint64_t> items;  // (a SET to match, what is left after it), ascending
    bool may_end = false;
    std::unique_ptr<int32_t[]> next;
};

class automaton {
public:
    automaton(const int32_t * code, int32_t n_code, const int32_t * rules, int32_t n_rules, const uint8_t * sets, int32_t n_sets)
        : code_(code, code + 2 * static_cast<size_t>(n_code)), rules_(rules, rules + n_rules), sets_(sets, sets + 256 * static_cast<size_t>(n_sets)) {}

    std::mutex mutex;

    int32_t begin() {
        work_ = 0;
        start();
        for (const int32_t alternative : alternatives(0)) {
            push(alternative, NO_FRAME);
        }
        return settle();
    }

    int32_t step(int32_t from, const uint8_t * bytes, int64_t n) {
        work_ = 0;
        for (int64_t i = 0; i < n && from >= 0; i++) {
            from = follow(from, bytes[i]);
        }
        return from;
    }

    // 0: more must follow; 1: the text may end or go on; 2: it must end.
    int32_t ends(int32_t at) const { return !states_[at].may_end ? 0 : states_[at].items.empty() ? 2 : 1; }

    // order: tokens by their bytes, ascending; common: how many bytes each has in common with the one before it.
    void mask(int32_t from, const uint8_t * bytes, const int64_t * offsets, const int32_t * order, const int32_t * common, int32_t n, uint8_t * allowed) {
        work_ = 0;
        std::vector<int32_t> path{from};  // states along the last token, as far as it goes
        bool died = false;
        for (int32_t k = 0; k < n; k++) {
            const int32_t token = order[k];
            const uint8_t * text = bytes + offsets[token];
            const int64_t length = offsets[token + 1] - offsets[token];
            const size_t shared = static_cast<size_t>(common[k]);
            if (died && shared >= path.size()) {
                continue;  // it begins with what could not go on
            }
            path.resize(std::min(path.size(), shared + 1));
            died = false;
            while (!died && static_cast<int64_t>(path.size()) <= length) {
                const int32_t to = follow(path.back(), text[path.size() - 1]);
                died = to == DEAD;
                if (!died) {
                    path.push_back(to);
                }
            }
            allowed[token] = !died && length > 0;
        }
    }

private:
    std::vector<int32_t> code_, rules_;
    std::vector<uint8_t> sets_;
    std::vector<state> states_;
    std::map<std::pair<bool, std::vector<uint64_t>>, int32_t> known_;
    std::vector<frame> frames_;
    std::unordered_map<uint64_t, int32_t> frame_ids_;
    std::vector<frame> todo_;
    std::unordered_set<uint64_t> seen_;
    state made_;
    int64_t work_ = 0, step_ = 0;

    int32_t kind_at(int32_t at) const { return code_[2 * static_cast<size_t>(at)]; }
    int32_t value_at(int32_t at) const { return code_[2 * static_cast<size_t>(at) + 1]; }
    bool is_last(int32_t at) const { return kind_at(at) == END || kind_at(at) == OR; }

    std::vector<int32_t> alternatives(int32_t rule) const {
        std::vector<int32_t> found{rules_[rule]};
        for (int32_t at = rules_[rule]; kind_at(at) != END; at++) {
            if (kind_at(at) == OR) {
                found.push_back(at + 1);
            }
        }
        return found;
    }

    int32_t follow(int32_t from, uint8_t byte) {
        if (++work_ > MAX_CALL) {
            throw give_up();
        }
        if (states_[from].next && states_[from].next[byte] != UNKNOWN) {
            return states_[from].next[byte];
        }
        start();
        for (size_t i = 0; i < states_[from].items.size(); i++) {
            const uint64_t item = states_[from].items[i];
            const int32_t at = static_cast<int32_t>(item >> 32);
            if (sets_[256 * static_cast<size_t>(value_at(at)) + byte]) {
                push(at + 1, static_cast<int32_t>(item & 0xffffffffu));
            }
        }
        const int32_t to = settle();
        if (!states_[from].next) {
            states_[from].next = std::make_unique<int32_t[]>(256);
            std::fill_n(states_[from].next.get(), 256, UNKNOWN);
        }
        states_[from].next[byte] = to;
        return to;
    }

    void start() {
        step_ = 0;
        todo_.clear();
        seen_.clear();
        made_ = state();
    }

    void push(int32_t at, int32_t rest) {
        if (++step_ > MAX_STEP || ++work_ > MAX_CALL) {
            throw give_up();
        }
        if (seen_.insert(packed(at, rest)).second) {
            todo_.push_back({at, rest});
        }
    }

    // All stacks that what was pushed leads to without another byte, as a state.
    int32_t settle() {
        while (!todo_.empty()) {
            const frame one = todo_.back();
            todo_.pop_back();
            if (is_last(one.at)) {
                if (one.rest == NO_FRAME) {
                    made_.may_end = true;
                } else {
                    push(frames_[one.rest].at, frames_[one.rest].rest);
                }
            } else if (kind_at(one.at) == SET) {
                made_.items.push_back(packed(one.at, one.rest));
            } else {
                // Nothing is left of the rule that ends with another: its own rest is that one's.
                const int32_t rest = is_last(one.at + 1) ? one.rest : framed(one.at + 1, one.rest);
                for (const int32_t alternative : alternatives(value_at(one.at))) {
                    push(alternative, rest);
                }
            }
        }
        return kept();
    }

    int32_t framed(int32_t at, int32_t rest) {
        const auto [found, inserted] = frame_ids_.try_emplace(packed(at, rest), static_cast<int32_t>(frames_.size()));
        if (inserted) {
            if (frames_.size() >= MAX_FRAMES) {
                throw give_up();
            }
            frames_.push_back({at, rest});
        }
        return found->second;
    }

    int32_t kept() {
        if (made_.items.empty() && !made_.may_end) {
            return DEAD;
        }
        if (made_.items.size() > MAX_ITEMS) {
            throw give_up();
        }
        std::sort(made_.items.begin(), made_.items.end());
        const auto [found, inserted] = known_.try_emplace({made_.may_end, made_.items}, static_cast<int32_t>(states_.size()));
        if (inserted) {
            if (states_.size() >= MAX_STATES) {
                throw give_up();
            }
            states_.push_back(std::move(made_));
        }
        return found->second;
    }
};

// No exception may leave for C.
template <typename F> int32_t guarded(automaton * grammar, F compute) {
    const std::lock_guard<std::mutex> lock(grammar->mutex);
    try {
        return compute();
    } catch (const give_up &) {
        return TOO_MUCH;
    } catch (const std::bad_alloc &) {
        return TOO_MUCH;
    }
}

}  // namespace

void * lzn_grammar_new(const int32_t * code, int32_t n_code, const int32_t * rules, int32_t n_rules, const uint8_t * sets, int32_t n_sets) {
    try {
        return new automaton(code, n_code, rules, n_rules, sets, n_sets);
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void lzn_grammar_free(void * grammar) { delete static_cast<automaton *>(grammar); }

int32_t lzn_grammar_begin(void * grammar) {
    automaton * one = static_cast<automaton *>(grammar);
    return guarded(one, [&] { return one->begin(); });
}

int32_t lzn_grammar_step(void * grammar, int32_t state, const uint8_t * bytes, int64_t n) {
    automaton * one = static_cast<automaton *>(grammar);
    return guarded(one, [&] { return one->step(state, bytes, n); });
}

int32_t lzn_grammar_ends(void * grammar, int32_t state) {
    automaton * one = static_cast<automaton *>(grammar);
    return guarded(one, [&] { return one->ends(state); });
}

int32_t lzn_grammar_mask(void * grammar, int32_t state, const uint8_t * bytes, const int64_t * offsets, const int32_t * order, const int32_t * common, int32_t n, uint8_t * allowed) {
    automaton * one = static_cast<automaton *>(grammar);
    return guarded(one, [&] {
        one->mask(state, bytes, offsets, order, common, n, allowed);
        return 0;
    });
}
