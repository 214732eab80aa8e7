"""Routes that read: who am I, what does a repository hold, a file."""

from __future__ import annotations

from .server import Answer, Groups, Request, answer_json, refuse, route
from .state import Repo, describe, git_sha1, is_large, sha256

ID = r"(?P<repo>[^/]+/[^/]+)"


def visible(request: Request, repo_id: str) -> Repo | Answer:
    """The repository, or why this user may not see it."""
    repo = request.world.repos.get(repo_id)
    if repo is None or repo.kind != "model" or (repo.private and request.user is None):
        return refuse(404 if request.user else 401, "RepoNotFound", "Repository not found")
    return repo


@route("GET", "/api/whoami-v2")
def whoami(request: Request, groups: Groups) -> Answer:
    user = request.user
    if user is None:
        return refuse(401, message="Invalid username or password.")
    return answer_json(
        {
            "type": "user",
            "name": user.name,
            "orgs": [{"name": org} for org in user.orgs],
            "auth": {"type": "access_token", "accessToken": {"role": user.role}},
        }
    )


@route("GET", f"/api/models/{ID}(/revision/(?P<revision>.+))?")
def info(request: Request, groups: Groups) -> Answer:
    repo = visible(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    commit = repo.resolve(groups["revision"] or "main")
    if commit is None:
        return refuse(404, "RevisionNotFound")
    files = [{"rfilename": path} for path in repo.files(commit)]
    return answer_json(
        {"id": groups["repo"], "sha": commit, "private": repo.private, "siblings": files}
    )


@route("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
def tree(request: Request, groups: Groups) -> Answer:
    repo = visible(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    commit = repo.resolve(groups["revision"])
    if commit is None:
        return refuse(404, "RevisionNotFound")
    if groups["path"]:  # folders are not asked for
        return refuse(404, "EntryNotFound")
    return answer_json([describe(path, data) for path, data in repo.files(commit).items()])


@route("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request, groups: Groups) -> Answer:
    repo = visible(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    if repo.gated:
        return refuse(403, "GatedRepo", "Access to this model is restricted")
    commit = repo.resolve(groups["revision"])
    if commit is None:
        return refuse(404, "RevisionNotFound")
    data = repo.files(commit).get(groups["path"])
    if data is None:
        return refuse(404, "EntryNotFound")
    if not is_large(groups["path"]):
        etag = {"ETag": f'"{git_sha1(data)}"', "X-Repo-Commit": commit}
        return _file(request, groups["path"], data, etag)
    oid = sha256(data)
    request.world.large[oid] = data
    return Answer(
        302,
        b"",
        {
            "Location": f"{request.server.storage}/storage/{oid}/{groups['path']}",
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{oid}"',
            "X-Repo-Commit": commit,
        },
    )


@route("GET", "/storage/(?P<oid>[0-9a-f]{64})/(?P<path>.+)")
def stored(request: Request, groups: Groups) -> Answer:
    data = request.world.large[groups["oid"]]
    return _file(request, groups["path"], data, {"ETag": f'"{groups["oid"]}"'})


def _file(request: Request, path: str, data: bytes, headers: dict[str, str]) -> Answer:
    status, wanted = 200, request.headers.get("Range")
    if wanted and request.server.ranges:
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        total = len(data)
        data = data[int(first) : int(last or total) + 1]
        status = 206
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{total}"
    if request.method == "GET":
        request.server.sent[path] = request.server.sent.get(path, 0) + len(data)
    return Answer(status, data, headers)
