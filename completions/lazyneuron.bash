# Tab in bash for `lazyneuron`, and for `python -m runtime`, `convert` and `predictors`: source this file in ~/.bashrc.
# The program itself answers, through argcomplete's protocol (https://kislyuk.github.io/argcomplete/); other uses of python get files, as before.

_lazyneuron() {
    COMPREPLY=()
    local program=("${COMP_WORDS[0]/#\~/$HOME}")
    if [[ ${program[0]##*/} == python* ]]; then
        [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} =~ ^(runtime|convert|predictors|lazyneuron)$ ]] || return 0
        program+=(-m "${COMP_WORDS[2]}")
    fi
    (( COMP_CWORD >= ${#program[@]} )) || return 0
    local IFS=$'\n'
    COMPREPLY=($(
        export _ARGCOMPLETE=${#program[@]} _ARGCOMPLETE_SHELL=bash _ARGCOMPLETE_IFS=$'\n' _ARGCOMPLETE_SUPPRESS_SPACE=1
        export _ARGCOMPLETE_COMP_WORDBREAKS="$COMP_WORDBREAKS" COMP_LINE COMP_POINT COMP_TYPE
        "${program[@]}" 8>&1 9>/dev/null >/dev/null 2>&1 </dev/null
    ))
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[/=:] ]]; then
        compopt -o nospace
    fi
}

complete -o default -o bashdefault -F _lazyneuron lazyneuron python python3
