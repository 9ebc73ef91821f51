"""One training module per kind of routed system, in plain PyTorch; `train_system.py` runs them."""

from .adapted import Adapted, System
from .dense import HYDRALORA, LORAMOE
from .mixlora import MIXLORA
from .ranks import FLYLORA, SMORA
from .sparse import ADAMOLE, MOLA

__all__ = ["SYSTEMS", "Adapted", "System"]

SYSTEMS = {
    "loramoe": LORAMOE, "hydralora": HYDRALORA, "mola": MOLA, "adamole": ADAMOLE, "smora": SMORA,
    "flylora": FLYLORA, "mixlora": MIXLORA,
}  # fmt: skip
