"""Routes that write: create a repository or branch, upload large files, commit."""

from __future__ import annotations

import base64
import json

from huggingface_hub import RepoCard

from .reading import ID, visible
from .server import Answer, Groups, Request, answer_json, refuse, route
from .state import Repo, git_sha1, is_large, sha256


def writable(request: Request, repo_id: str) -> Repo | Answer:
    repo = visible(request, repo_id)
    if isinstance(repo, Answer):
        return repo
    if request.user is None or not request.user.may_write(repo_id):
        return refuse(403, message="You don't have the required permissions")
    return repo


@route("POST", "/api/repos/create")
def create(request: Request, groups: Groups) -> Answer:
    if request.user is None:
        return refuse(401, message="Invalid username or password.")
    asked = request.json()
    repo_id = f"{asked.get('organization') or request.user.name}/{asked['name']}"
    if repo_id in request.world.repos:
        there = {"error": "You already created this model repo", "url": _url(request, repo_id)}
        return answer_json(there, 409)
    if not request.user.may_write(repo_id):
        return refuse(403, message="You don't have the rights to create a model under this")
    private = asked.get("visibility") == "private"
    request.world.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
    return answer_json({"url": _url(request, repo_id), "name": repo_id})


def _url(request: Request, repo_id: str) -> str:
    return f"{request.server.url}/{repo_id}"


@route("POST", f"/api/models/{ID}/branch/(?P<branch>.+)")
def branch(request: Request, groups: Groups) -> Answer:
    repo = writable(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    if groups["branch"] in repo.branches:
        return refuse(409, message="Reference already exists")
    repo.branches[groups["branch"]] = repo.branches["main"]
    return answer_json({})


@route("POST", "/api/validate-yaml")
def validate(request: Request, groups: Groups) -> Answer:
    content = request.json()["content"]
    if not content.startswith("---\n"):
        return answer_json({"errors": [], "warnings": [{"message": "empty or missing yaml"}]})
    try:
        relation = RepoCard(content).data.get("base_model_relation")
    except Exception as error:
        return answer_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    if relation not in (None, "quantized", "adapter", "finetune", "merge"):
        return answer_json({"errors": [{"message": "no such relation"}], "warnings": []}, 400)
    return answer_json({"errors": [], "warnings": []})


@route("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, groups: Groups) -> Answer:
    repo = writable(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    commit = repo.resolve(groups["revision"])
    if commit is None:
        return refuse(404, "RevisionNotFound")
    there = repo.files(commit)
    answers = []
    for file in request.json()["files"]:
        path = file["path"]
        old = there.get(path)
        name = None if old is None else (sha256 if is_large(path) else git_sha1)(old)
        mode = "lfs" if is_large(path) else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": name})
    return answer_json({"files": answers})


@route("POST", f"/{ID}.git/info/lfs/objects/batch")
def batch(request: Request, groups: Groups) -> Answer:
    repo = writable(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    objects = []
    for asked in request.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        entry: dict[str, object] = {"oid": oid, "size": size}
        if oid not in request.world.large:
            entry["actions"] = {
                "upload": _upload(request, oid, size),
                "verify": {"href": f"{request.server.url}/verify/{oid}"},
            }
        objects.append(entry)
    multipart = request.world.part_size is not None
    return answer_json({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _upload(request: Request, oid: str, size: int) -> dict[str, object]:
    step, place = request.world.part_size, f"{request.server.storage}/put/{oid}"
    if step is None or size <= step:
        return {"href": place}
    urls = {str(k + 1): f"{place}/{k + 1}" for k in range(-(-size // step))}
    href = f"{request.server.url}/complete/{oid}"
    return {"href": href, "header": {"chunk_size": str(step), **urls}}


@route("PUT", "/put/(?P<oid>[0-9a-f]{64})(/(?P<part>[0-9]+))?")
def put(request: Request, groups: Groups) -> Answer:
    oid = groups["oid"]
    if not groups["part"]:
        if sha256(request.body) != oid:
            return refuse(400, message="other content than announced")
        request.world.large[oid] = request.body
    else:
        request.world.parts.setdefault(oid, {})[int(groups["part"])] = request.body
    return Answer(200, b"", {"ETag": f'"{sha256(request.body)}"'})


@route("POST", "/complete/(?P<oid>[0-9a-f]{64})")
def complete(request: Request, groups: Groups) -> Answer:
    parts = request.world.parts[groups["oid"]]
    named = request.json()["parts"]
    data = b"".join(parts[part["partNumber"]] for part in named)
    etags = [part["etag"].strip('"') for part in named]
    wanted = [sha256(parts[part["partNumber"]]) for part in named]
    if sha256(data) != groups["oid"] or etags != wanted:
        return refuse(400, message="the parts are not the file")
    request.world.large[groups["oid"]] = data
    return answer_json({})


@route("POST", "/verify/(?P<oid>[0-9a-f]{64})")
def verify(request: Request, groups: Groups) -> Answer:
    data = request.world.large.get(groups["oid"])
    whole = data is not None and len(data) == request.json()["size"]
    return answer_json({}) if whole else refuse(404, message="not uploaded")


@route("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)")
def commit(request: Request, groups: Groups) -> Answer:
    repo = writable(request, groups["repo"])
    if isinstance(repo, Answer):
        return repo
    revision = groups["revision"]
    if revision not in repo.branches:
        return refuse(404, "RevisionNotFound")
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    parent = header.get("parentCommit")
    if parent not in (None, repo.branches[revision]):
        return refuse(412, message="A commit has happened since. Please refresh and try again.")
    files = dict(repo.files(repo.branches[revision]))
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in request.world.large:
                return refuse(400, message=f"{value['path']} was not uploaded")
            files[value["path"]] = request.world.large[value["oid"]]
        elif line["key"] == "deletedFile":
            files.pop(value["path"])
    name = repo.commit(revision, files, header["summary"])
    url = f"{request.server.url}/{groups['repo']}/commit/{name}"
    return answer_json({"commitUrl": url, "commitOid": name, "success": True})
