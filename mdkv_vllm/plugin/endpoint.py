"""``GET /mixeddim/status``: what the server does, off unless asked for.

vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them. It asks for the API key
below ``/v1`` alone, so this path asks for it itself, by vLLM's own check.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from mdkv_vllm.plugin.registration import mixeddim_selected

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


def require_api_key(request: Request) -> None:
    """Refuse a request without one of the server's API keys, if the server has any.

    Raises:
        HTTPException: 401 where the key is missing or wrong.
    """
    # As vLLM does: --api-key goes before the variable.
    keys = [key for key in (request.app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
    if keys and not AuthenticationMiddleware(request.app, keys).verify_token(request.headers):
        raise HTTPException(401, "Unauthorized")


router = APIRouter(prefix="/mixeddim", dependencies=[Depends(require_api_key)])


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Configuration, kernels, totals since start-up, resident requests and the latest compressions.

    They are those of the first worker of the first engine; ``/metrics`` adds all up.

    Raises:
        HTTPException: 401 without the server's API key; 404 where the server's attention
            backend is not mixeddim.
    """
    engine = request.app.state.engine_client
    if not mixeddim_selected(engine.vllm_config):
        raise HTTPException(404, "the attention backend of this server is not mixeddim")
    workers = await engine.collective_rpc("mixeddim_status")
    return workers[0]


class StatusEndpoint:
    """The plugin object that vLLM asks for."""

    name = "mixeddim"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Nothing to prepare: the engine client already is in the application's state."""
