"""A custom node without nodes, for the soak test: how much memory ComfyUI's process really holds.

What a program gives free stays with the system's allocator, in pages that other data may share; of these it returns what it can
before the count. On systems where the allocator cannot be asked, such as macOS, the count is what the process has.
"""

import ctypes
import gc
import resource
import sys

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}


@PromptServer.instance.routes.get("/soak/memory")
async def memory(request: web.Request) -> web.Response:
    """Bytes that the process has, as it is and when everything free has been returned."""
    before = _resident()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return web.json_response({"resident": before, "held": _resident()})


def _resident() -> int:
    if sys.platform != "linux":
        import psutil  # ComfyUI needs it too

        return psutil.Process().memory_info().rss
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * resource.getpagesize()
