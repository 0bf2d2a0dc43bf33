"""`fedproxy completion`: what the Tab key does in bash, zsh and fish."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

from fedproxy.command import COMMANDS, run_command
from fedproxy.errors import ConfigError, nearest
from fedproxy.recipe_files import recipe_names, study_names

USAGE = """
usage: python -m fedproxy.completion bash | zsh | fish

Prints what the shell needs to complete commands, recipes, keys and values of `fedproxy ...`.

examples:
  echo 'source <(fedproxy completion bash)' >> ~/.bashrc
  echo 'source <(fedproxy completion zsh)' >> ~/.zshrc        after compinit
  fedproxy completion fish > ~/.config/fish/completions/fedproxy.fish
"""

_BASH = r"""
_fedproxy() {
    local IFS=$' \t\n' words line=${COMP_LINE:0:COMP_POINT}
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local word=${words[-1]} ours
    ours=$("${words[0]/#\~/$HOME}" completion words "${words[@]:1}" 2>/dev/null)
    IFS=$'\n'
    COMPREPLY=($ours)
    # bash replaces what stands behind the last = or : alone.
    [[ $word == *[=:]* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    return 0
}
complete -o default -F _fedproxy fedproxy
"""
_ZSH = r"""
_fedproxy() {
    local -a ours
    ours=(${(f)"$(${(Q)words[1]} completion words "${(@Q)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ! $#ours )); then
        compset -P '*='
        _files
        return
    fi
    compadd -S '' -- ${(M)ours:#*[=.]}
    compadd -- ${ours:#*[=.]}
}
compdef _fedproxy fedproxy
"""
_FISH = r"""
complete -c fedproxy -a '(
    set -l typed (commandline -opc) (commandline -ct)
    $typed[1] completion words $typed[2..-1] 2>/dev/null
)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_VERBS: dict[str, tuple[str, ...]] = {
    "assets": ("fetch", "ls"),
    "completion": tuple(_SCRIPTS),
    "hub": ("init", "register", "status", "up"),
    "recipes": ("cp", "ls", "plan", "show"),
    "site": ("check", "init", "status", "up"),
}


def main(arguments: Sequence[str]) -> None:
    """Print a shell's script or, for ``words WORD ...``, which such scripts ask for, what the last word may become.

    Raises:
        ConfigError: If the words name no shell.
    """
    match list(arguments):
        case ["words", *words]:
            print(*candidates(words), sep="\n")
        case [shell] if shell in _SCRIPTS:
            print(_SCRIPTS[shell].strip())
        case _:
            given = " ".join(arguments)
            raise ConfigError(f"completion takes the name of a shell, got {given!r}{nearest(given, _SCRIPTS)}")


def candidates(words: Sequence[str]) -> list[str]:
    """Return what the last word of a command line, without ``fedproxy`` itself, may become; none where it is a file."""
    *before, word = words or ("",)
    found = _after(before[0], before[1:], word) if before else COMMANDS
    return sorted(candidate for candidate in found if candidate.startswith(word))


def _after(command: str, before: Sequence[str], word: str) -> Iterable[str]:
    match command, list(before):
        case (("fit" | "compress"), _):
            return _settings(word, before, recipe=recipe_names)
        case "compare", _:
            return _settings(word, before, recipes=recipe_names, study=study_names)
        case "evaluate", _:
            from fedproxy.evaluate import EvaluateArguments

            return [f"{item.name}=" for item in fields(EvaluateArguments)]
        case "recipes", ["show" | "cp" | "plan"]:
            return recipe_names()
        case "recipes", ["plan", *_]:
            return _settings(word, before)
        case "assets", ["fetch", *_]:
            from fedproxy.data.assets import catalog

            return catalog()
        case "report", []:
            return ["--watch"]
        case _, []:
            return _VERBS.get(command, ())
    return ()


def _settings(word: str, before: Sequence[str], **named: Callable[[], Sequence[str]]) -> Iterable[str]:
    """Return keys and values of a recipe's words, and of keys that name shipped files; in a list behind those before.

    Args:
        word: As far as it is typed.
        before: The words before it.
        named: The names that such a key can have.
    """
    key, sign, _ = word.partition("=")
    if sign and key in named:
        begun = word[: max(word.rfind(mark) for mark in "=[,") + 1]
        return [f"{begun}{'[' if key == 'recipes' and begun[-1] == '=' else ''}{name}" for name in named[key]()]
    from fedproxy.config.key_words import key_words

    return (*(f"{key}=" for key in named), *key_words(word, before))


if __name__ == "__main__":
    run_command(main, USAGE)
