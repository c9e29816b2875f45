"""Whether the Hugging Face hub can be reached, found out in seconds.

Its libraries try again for half a minute before they look into their caches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kanlm.errors import first_line

#: Seconds that the hub has to answer.
PATIENCE = 5


def hub_problem() -> str | None:
    """Return why the hub cannot be reached, None if it can; HF_HUB_OFFLINE is respected."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # Of whichever HTTP client.
        return first_line(error)
    return None


@contextmanager
def offline() -> Iterator[None]:
    """Let the hub's libraries look into their caches alone, as HF_HUB_OFFLINE would."""
    from datasets import config
    from huggingface_hub import constants

    # They read the variable once, when they are imported.
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
