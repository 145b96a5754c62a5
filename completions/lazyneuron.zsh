# Tab in zsh for `lazyneuron`, and for `python -m runtime`, `convert` and `predictors`: source this file in ~/.zshrc, after compinit.
# The program itself answers, through argcomplete's protocol (https://kislyuk.github.io/argcomplete/); other uses of python are completed as before.

_lazyneuron() {
    local -a program
    program=("${words[1]/#\~/$HOME}")
    if [[ ${program[1]:t} == python* ]]; then
        if (( CURRENT < 4 )) || [[ $words[2] != -m || $words[3] != (runtime|convert|predictors|lazyneuron) ]]; then
            _python "$@"
            return
        fi
        program+=(-m $words[3])
    fi
    local -a answers folders others
    answers=("${(@f)$(
        export _ARGCOMPLETE=${#program} _ARGCOMPLETE_IFS=$'\n' _ARGCOMPLETE_SUPPRESS_SPACE=1
        export COMP_LINE="${(j: :)words[1,CURRENT]}" COMP_TYPE=9
        export COMP_POINT=${#COMP_LINE}
        $program 8>&1 9>/dev/null >/dev/null 2>&1 </dev/null
    )}")
    folders=(${(M)answers:#*/}) others=(${answers:#*/})
    compadd -Q -S '' -a folders
    compadd -Q -a others
}

autoload -Uz _python
compdef _lazyneuron lazyneuron python python3
