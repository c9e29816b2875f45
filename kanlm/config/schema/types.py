"""Numbers that settings may be, as types: pydantic checks them, `kanlm settings` says them."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

PositiveInt = Annotated[int, Gt(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
#: A share, both ends included.
Fraction = Annotated[float, Ge(0), Le(1)]
#: numpy's generators take no more than 32 bits.
Seed = Annotated[int, Ge(0), Lt(2**32)]
