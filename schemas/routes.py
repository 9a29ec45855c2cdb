"""The HTTP route of each RPC method, read by the server, the client and the OpenAPI document.

`{model}` is `name` or `org/name` (also `org%2Fname`); `{version}` a version or, for reading, an alias. A path variable
carries the parameter that `PATH_PARAMETERS` names; what is left of the parameters travels in the query for GET and
DELETE, and as the JSON body otherwise. `getModel` has no row: over HTTP its bytes are at `CONTENT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verb = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]

CONTENT = "/api/models/{model}/versions/{version}/content"
FILE = "/api/models/{model}/versions/{version}/files/{path}"
UPLOAD_FILE = "/api/uploads/{upload}/files/{path}"

# The path variable for each parameter that a path carries.
PATH_PARAMETERS = {
    "model": "modelId",
    "version": "version",
    "alias": "alias",
    "upload": "uploadId",
    "job": "jobId",
}


@dataclass(frozen=True, slots=True)
class Route:
    """`created` is the status of a reply that made something new (201), else 200."""

    method: str
    verb: Verb
    path: str
    created: int = 200


ROUTES: tuple[Route, ...] = (
    Route("listModels", "GET", "/api/models"),
    Route("searchModels", "POST", "/api/models/search"),
    Route("storeModel", "POST", "/api/models", created=201),
    Route("getModelMetadata", "GET", "/api/models/{model}"),
    Route("deleteModel", "DELETE", "/api/models/{model}"),
    Route("restoreModel", "POST", "/api/models/{model}/restore"),
    Route("getModelMetadata", "GET", "/api/models/{model}/versions/{version}"),
    Route("updateModelMetadata", "PATCH", "/api/models/{model}/versions/{version}"),
    Route("deleteModel", "DELETE", "/api/models/{model}/versions/{version}"),
    Route("restoreModel", "POST", "/api/models/{model}/versions/{version}/restore"),
    Route("validateModel", "POST", "/api/models/{model}/versions/{version}/validate"),
    Route("replicateModel", "POST", "/api/models/{model}/versions/{version}/replicate"),
    Route("setAlias", "PUT", "/api/models/{model}/aliases/{alias}"),
    Route("deleteAlias", "DELETE", "/api/models/{model}/aliases/{alias}"),
    Route("createUpload", "POST", "/api/uploads", created=201),
    Route("getUpload", "GET", "/api/uploads/{upload}"),
    Route("getUpload", "POST", "/api/uploads/{upload}/parts"),
    Route("completeUpload", "POST", "/api/uploads/{upload}/complete"),
    Route("abortUpload", "DELETE", "/api/uploads/{upload}"),
    Route("getStorageStats", "GET", "/api/stats"),
    Route("getChanges", "GET", "/api/changes"),
    Route("getJob", "GET", "/api/jobs/{job}"),
    Route("cancelJob", "DELETE", "/api/jobs/{job}"),
    Route("ping", "GET", "/api/ping"),
)
