"""Strategies that train a part of the model: no update, and no decay, of the rest."""

from kanlm.training.strategies.base import Strategy


class Plain(Strategy):
    """Fine-tunes every parameter on the new text, and does nothing about forgetting."""

    name = "plain"


class Frozen(Strategy):
    """Changes nothing: a lower bound of what is forgotten and learned."""

    name = "frozen"
    limits_updates = True

    def trains(self, name: str) -> bool:
        """No parameter is trained."""
        return False


class FeedForwardOnly(Strategy):
    """Trains the feed-forward blocks alone: no attention, embedding or norm between blocks."""

    name = "feed-forward-only"

    def trains(self, name: str) -> bool:
        """What is within a feed-forward block is trained."""
        return ".feed_forward." in name


class AttentionOnly(Strategy):
    """Trains the attention alone: no feed-forward block, embedding or norm between blocks."""

    name = "attention-only"
    limits_updates = True

    def trains(self, name: str) -> bool:
        """What is within an attention is trained."""
        return ".attention." in name
