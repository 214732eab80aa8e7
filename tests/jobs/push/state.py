"""What the Hub of the tests holds: repositories with branches and commits, large files, users."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FIRST = "1234567890abcdef1234567890abcdef12345678"
LARGE = (".safetensors", ".bin", ".png")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file as LFS."""
    return path.endswith(LARGE)


def describe(path: str, data: bytes) -> dict[str, object]:
    """A file in an answer to `tree`."""
    entry: dict[str, object] = {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": git_sha1(data),
    }
    if is_large(path):
        pointer = f"version https://git-lfs\noid sha256:{sha256(data)}\n".encode()
        lfs = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
        entry |= {"oid": git_sha1(pointer), "lfs": lfs}
    return entry


@dataclass
class Repo:
    """A repository: `commits` are whole sets of files, `branches` name the newest of each."""

    private: bool = False
    kind: str = "model"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    gated: bool = False

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a hash means."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, commit: str) -> Mapping[str, bytes]:
        return self.commits[commit]

    def commit(self, branch: str, files: Mapping[str, bytes], message: str = "") -> str:
        name = sha256(f"{len(self.commits)}{sorted(files)}{message}".encode())[:40]
        self.commits[name] = dict(files)
        self.branches[branch] = name
        self.messages.append(message)
        return name

    @property
    def main(self) -> Mapping[str, bytes]:
        """The files of the main branch."""
        return self.files(self.branches["main"])


class FolderRepo(Repo):
    """A repository whose only commit is what a folder holds at the moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(commits={FIRST: {}}, branches={"main": FIRST})
        self.folder = folder

    def files(self, commit: str) -> Mapping[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


@dataclass
class User:
    """Who a token belongs to, and what it may do."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.partition("/")[0]
        return self.role == "write" and owner in (self.name, *self.orgs)


@dataclass
class World:
    """Everything behind the server."""

    repos: dict[str, Repo] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    part_size: int | None = None
    """Files above it are uploaded in parts of it."""
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.users.setdefault("hf_writer", User("me", "write", ("org",)))
        self.users.setdefault("hf_reader", User("me", "read", ("org",)))

    def add(self, repo_id: str, files: Mapping[str, bytes], **fields: object) -> Repo:
        """A repository with one commit."""
        repo = self.repos[repo_id] = Repo(**fields)  # type: ignore[arg-type]
        repo.commit("main", files, "initial commit")
        return repo
