# Tab in bash for `python -m runtime`, `convert` and `predictors`: source this file in ~/.bashrc.
# The program itself answers, through argcomplete's protocol (https://kislyuk.github.io/argcomplete/); other uses of python get files, as before.

_lazyneuron() {
    COMPREPLY=()
    [[ $COMP_CWORD -gt 2 && ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} =~ ^(runtime|convert|predictors)$ ]] || return 0
    local IFS=$'\n'
    COMPREPLY=($(
        export _ARGCOMPLETE=3 _ARGCOMPLETE_SHELL=bash _ARGCOMPLETE_IFS=$'\n' _ARGCOMPLETE_SUPPRESS_SPACE=1
        export _ARGCOMPLETE_COMP_WORDBREAKS="$COMP_WORDBREAKS" COMP_LINE COMP_POINT COMP_TYPE
        "${COMP_WORDS[0]/#\~/$HOME}" -m "${COMP_WORDS[2]}" 8>&1 9>/dev/null >/dev/null 2>&1 </dev/null
    ))
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[/=:] ]]; then
        compopt -o nospace
    fi
}

complete -o default -o bashdefault -F _lazyneuron python python3
