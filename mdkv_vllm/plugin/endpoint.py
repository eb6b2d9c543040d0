"""``GET /mixeddim/status``: totals and the latest compressions, off unless asked for.

vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request

from mdkv_vllm.plugin.registration import mixeddim_selected

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

router = APIRouter(prefix="/mixeddim")


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Totals since start-up and the latest compressions of the first worker.

    Raises:
        HTTPException: 404 where the server's attention backend is not mixeddim.
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
