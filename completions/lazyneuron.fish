# Tab in fish for `lazyneuron`, and for `python -m runtime`, `convert` and `predictors`: source this file in ~/.config/fish/config.fish.
# The program itself answers, through argcomplete's protocol (https://kislyuk.github.io/argcomplete/).

function __lazyneuron --argument-names n
    set -l words (commandline -opc)
    set -l program $words[1..$n]
    set -lx _ARGCOMPLETE $n
    set -lx _ARGCOMPLETE_DFS \t
    set -lx _ARGCOMPLETE_IFS \n
    set -lx _ARGCOMPLETE_SUPPRESS_SPACE 1
    set -lx _ARGCOMPLETE_SHELL fish
    set -lx COMP_LINE (commandline -cp)
    set -lx COMP_POINT (string length -- $COMP_LINE)
    $program 8>&1 9>/dev/null >/dev/null 2>/dev/null </dev/null
end

for python in python python3
    complete -c $python -n 'string match -qr -- "^\S+ -m (runtime|convert|predictors|lazyneuron) " (commandline -cp)' -f -a '(__lazyneuron 3)'
end
complete -c lazyneuron -f -a '(__lazyneuron 1)'
