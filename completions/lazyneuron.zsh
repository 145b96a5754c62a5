# Tab in zsh for `python -m runtime`, `convert` and `predictors`: source this file in ~/.zshrc, after compinit.
# The program itself answers, through argcomplete's protocol (https://kislyuk.github.io/argcomplete/); other uses of python are completed as before.

_lazyneuron() {
    if (( CURRENT < 4 )) || [[ $words[2] != -m || $words[3] != (runtime|convert|predictors) ]]; then
        _python "$@"
        return
    fi
    local -a answers folders others
    answers=("${(@f)$(
        export _ARGCOMPLETE=3 _ARGCOMPLETE_IFS=$'\n' _ARGCOMPLETE_SUPPRESS_SPACE=1
        export COMP_LINE="${(j: :)words[1,CURRENT]}" COMP_TYPE=9
        export COMP_POINT=${#COMP_LINE}
        "${words[1]/#\~/$HOME}" -m $words[3] 8>&1 9>/dev/null >/dev/null 2>&1 </dev/null
    )}")
    folders=(${(M)answers:#*/}) others=(${answers:#*/})
    compadd -Q -S '' -a folders
    compadd -Q -a others
}

autoload -Uz _python
compdef _lazyneuron python python3
