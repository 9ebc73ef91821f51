"""Where a file may lie: the checks between a name somebody sent and a file that is opened."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from vllm_lora_ext.errors import AdapterError

# Where an absolute path of the server stands in a text. Texts may be long: no branch may
# take more than linear time.
_PATH = re.compile(
    r"""
    :// [^\s'"`,;<>()]*                # an address, which is passed by whole

    |                                  # in quotes: all between them
    (?: (?<! [\w\\] )                  # after a word or a backslash it is no opening quote,
      | (?<= (?<! [\w'"`] ) b ) )      # but for Python's bytes
    (?P<quote> ['"`] )
    (?P<quoted>
        /++ (?! v[12] (?! [\w.\-] ) )  # no route
        (?: (?! (?P=quote) (?! \w ) )  # a quote before a letter is an apostrophe
            (?: \\. | [^\n\\] ) )+
    )
    (?P=quote)

    |                                  # bare: up to a blank, a quote or the next path
    (?<! [^\s'"`=:(,;<\[{] )           # after one of these, or first
    (?P<bare>
        //? (?! v[12] (?! [\w.\-] ) )
        [^\s'"`,;()\[\]{}<>/]+ /++     # two parts at least: one alone may be a route
        (?: (?! [=:(,;\[{] / )
            (?: [^\s'"`<>] | ' (?= \w ) ) )+
        (?<! [.,:;)\]}/] )             # the sentence's, not the path's
    )
    """,
    re.VERBOSE,
)


def resolve_inside(
    path: str | os.PathLike[str],
    roots: Iterable[str | os.PathLike[str]],
    sent: str | None = None,
) -> Path:
    """The real path behind `path`, if it lies inside one of `roots`.

    A relative path is tried under every root in turn. `..`, absolute paths and symlinks are all
    judged by where they really lead.

    Args:
        sent: how whoever asks has written it, for the error: where the roots or somebody's home
            lie is the operator's affair. None: as `path`.
    Raises:
        AdapterError: `path_not_allowed`.
    """
    text = os.fspath(path)
    shown = [os.fspath(root) for root in roots]
    if _can_be(text):
        for root in shown:
            real_root = Path(os.path.realpath(root))
            real = Path(os.path.realpath(real_root / text))
            if real.is_relative_to(real_root):
                return real
    raise AdapterError(
        "path_not_allowed",
        "the adapter's path leads outside the allowed folders",
        seen=(text if sent is None else sent).replace("\0", "\\0"),
        limit="the folders of adapter_roots" if shown else "no folder at all",  # clients read this
        fix="put the adapter inside one of them, or start the server with that folder allowed",
    )


def shown(path: Path) -> str:
    """A folder's name for errors: as it was written where that is relative; else its last part.

    What a server reads is absolute, and where it lies is not for its clients.
    """
    return path.name if path.is_absolute() else str(path)


def without_paths(text: str, sent: Collection[str] = ()) -> str:
    """An error's text for whoever may not know how the server's disk looks.

    The last resort, for texts that nobody here has written. It cannot tell a path from all else:

    - what starts with /v1 or /v2 stays, and so does a bare path of one part (`/health`, `/data`);
      other routes and JSON pointers of two parts go as if they were paths;
    - a bare path ends at a blank, though its file's name may go on;
    - an address stays, `file:///data/x` too.

    Args:
        sent: paths that its reader has named. They stay, and so does what lies below those of two
            parts or more: whoever names / has not named all that there is.
    """
    own = {path.rstrip("/") for path in sent if path}
    above = [path + "/" for path in own if "/" in os.path.normpath(path).strip("/")]

    def hide(match: re.Match[str]) -> str:
        path = match["quoted"] or match["bare"]
        if not path or path.rstrip("/") in own or any(map(path.startswith, above)):
            return match[0]
        quote = match["quote"] or ""
        return f"{quote}<path>{quote}"

    return _PATH.sub(hide, text)


def real_file(
    folder: Path, name: str, roots: Iterable[str | os.PathLike[str]] | None = ()
) -> Path | None:
    """The real path of the regular file `name` in `folder`, or None when there is none.

    Args:
        roots: where a link out of the folder may lead; None: anywhere.
    Raises:
        AdapterError: `path_not_allowed`, see `check_inside`; `bad_file`, it is there but no
            regular file (opening a pipe would hang the server).
    """
    real = check_inside(folder, name, roots)
    try:
        mode = os.stat(real).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise AdapterError(
            "bad_file", f"'{name}' cannot be opened: {error.strerror}", fix="put a file there"
        ) from error
    if not stat.S_ISREG(mode):
        raise AdapterError("bad_file", f"'{name}' is not a regular file", fix="put a file there")
    return real


def check_inside(
    folder: Path, name: str, roots: Iterable[str | os.PathLike[str]] | None = ()
) -> Path:
    """The real path of `name` in `folder`, there or not.

    People link files from a store, as the Hugging Face cache does. Whoever may write a link into
    the folder may send the server to it, so a link must stay inside `roots`, where there are any.

    Raises:
        AdapterError: `path_not_allowed`, the name leads out of the folder, or a link out of the
            folder and the roots.
    """
    if not _can_be(name) or os.path.isabs(name):
        raise outside(name)
    real_folder = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(real_folder / name))
    if real.is_relative_to(real_folder) or _is_hub_blob(real_folder, real):
        return real
    by_link = ".." not in Path(name).parts
    if not by_link or not (roots is None or any(map(real.is_relative_to, _real(roots)))):
        raise outside(name)
    return real


def _can_be(text: str) -> bool:
    """Whether a file may have this name at all."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False


def _real(folders: Iterable[str | os.PathLike[str]]) -> list[str]:
    return [os.path.realpath(folder) for folder in folders]


def _is_hub_blob(real_folder: Path, real: Path) -> bool:
    """A snapshot in the Hugging Face cache is made of symlinks into its own `blobs` folder."""
    snapshots = real_folder.parent
    return snapshots.name == "snapshots" and real.parent == snapshots.parent / "blobs"


def outside(name: str) -> AdapterError:
    """The error for a name that leads out of an adapter's folder."""
    return AdapterError(
        "path_not_allowed",
        "a file of the adapter lies outside the adapter's folder",
        seen=name.replace("\0", "\\0"),
        fix="copy the file into the folder in place of the link",
    )
