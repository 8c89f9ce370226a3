"""ComfyUI nodes: schemas and wiring. The work is in ``llada2_mlx``, ComfyUI's runtime in ``host``."""

from comfy_api.latest import ComfyExtension, io

from .backbone import LoadLLaDA2Backbone
from .chat import LLaDA2Chat
from .generate import LLaDA2Edit, LLaDA2TextToVQ
from .grids import GRID_NODES
from .native import LLaDA2LoadZImageDecoder, LLaDA2VQToConditioning
from .redraw import LLaDA2Grow, LLaDA2Redraw
from .sprint import LLaDA2Sprint
from .story import LLaDA2Story
from .understand import LLaDA2Understand
from .vq import LLaDA2JoinVQ, SigLIPVQEncode, ZImageDecode


class LLaDA2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadLLaDA2Backbone,
            SigLIPVQEncode,
            LLaDA2JoinVQ,
            LLaDA2TextToVQ,
            LLaDA2Understand,
            LLaDA2Chat,
            LLaDA2Edit,
            LLaDA2Redraw,
            LLaDA2Grow,
            LLaDA2Story,
            LLaDA2Sprint,
            ZImageDecode,
            LLaDA2LoadZImageDecoder,
            LLaDA2VQToConditioning,
            *GRID_NODES,
        ]
