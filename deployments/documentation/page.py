"""The page /docs with all its files, and `/`. Everything comes from the gateway, so the page works without internet.

Swagger UI's script, style and icon are those of the package fastapi-swagger, which follows Swagger UI's releases. They
are the same files as in the npm package swagger-ui-dist.
"""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from deployments.errors import ApiError

HERE = Path(__file__).parent
SWAGGER = "fastapi_swagger.resources"
CACHED = "public, max-age=3600"
# only this gateway's own files, no inline script, and no other page may frame it
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
LINKS = {
    "name": "adaptive LLM router",
    "docs": "/docs",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "chat": "/v1/chat/completions",
    "feedback": "/v1/feedback",
    "state": "/v1/router/state",
    "health": ["/healthz", "/readyz"],
}


def add_docs_routes(app: FastAPI) -> None:
    """Add `/`, the page and its files to the gateway's application; none of them is in the API's description."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def root(http: Request) -> Response:
        """A browser is sent to the page; a program gets links."""
        vary = {"vary": "accept"}
        if "text/html" in http.headers.get("accept", ""):
            return RedirectResponse("docs", 307, vary)
        return JSONResponse(LINKS, headers=vary)

    @router.get("/docs")
    async def docs() -> Response:
        """The page."""
        return _file((HERE / "page.html").read_bytes(), "text/html", "no-cache")

    @router.get("/docs/start.js")
    async def start() -> Response:
        """The page's own script."""
        return _file((HERE / "start.js").read_bytes(), "text/javascript", "no-cache")

    @router.get("/docs/swagger-ui-bundle.js")
    async def script() -> Response:
        """Swagger UI's script."""
        return _of_swagger("swagger-ui-bundle.js", "text/javascript")

    @router.get("/docs/swagger-ui.css")
    async def style() -> Response:
        """Swagger UI's style."""
        return _of_swagger("swagger-ui.css", "text/css")

    @router.get("/docs/favicon.png")
    @router.get("/favicon.ico")
    async def icon() -> Response:
        """Swagger UI's icon."""
        return _of_swagger("favicon-32x32.png", "image/png")

    app.include_router(router)


def _of_swagger(name: str, media_type: str) -> Response:
    try:
        content = (files(SWAGGER) / name).read_bytes()
    except ModuleNotFoundError:
        # the gateway serves requests without it
        raise ApiError(
            503,
            "the package fastapi-swagger is not installed on this node; install requirements.lock, or read "
            "/openapi.json",
        ) from None
    return _file(content, media_type, CACHED)


def _file(content: bytes, media_type: str, cached: str) -> Response:
    return Response(
        content,
        media_type=media_type,
        headers={**HEADERS, "cache-control": cached},
    )
