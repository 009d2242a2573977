"""The account of a model's last replica: what it saves its requests, less what it costs.

Score points are paid in by the requests: what they lose while the model has no replica, or would lose without its last
one. The price of a replica is paid out all the time. The balance stays between 0 and what must be paid in before a
replica pays: c (C + H), where c is the price of a replica, C the time that it needs to start and H a time for which it
should stay. A full account wants a replica, and an empty one wants none; between the two nothing changes. So a start
and a stop are always as far apart as c (C + H), and noise in the arrivals does not make them chase each other.

This is the work function of the two states "a replica" and "none" (Borodin, Linial and Saks, Journal of the ACM 1992,
metrical task systems), with c (C + H) as the cost of going back and forth.
"""

from dataclasses import dataclass
from math import exp


@dataclass
class Account:
    """The account of one model.

    balance: score points, at least 0.
    wanted: whether the model should have a replica.
    rate: score points a minute that were paid in lately.
    ready: whether the model has a replica.
    """

    balance: float = 0.0
    wanted: bool = False
    rate: float = 0.0
    ready: bool = False

    @classmethod
    def of(cls, ready: bool, most: float) -> "Account":
        """The account of a model of which nothing is known but whether it has a replica: full or empty."""
        return cls(most if ready else 0.0, ready, ready=ready)

    def fill(self, most: float) -> None:
        """Pay in so much that a replica is wanted, whatever it costs."""
        self.balance = most
        self.wanted = True

    def book(
        self, paid: float, price: float, most: float, minutes: float, memory: float
    ) -> None:
        """Pay in what requests have lost or saved, and pay out the price of the time.

        Args:
            paid: score points of the requests in this time.
            price: of a replica, score points a minute.
            most: the highest balance, score points.
            minutes: duration of the time.
            memory: minutes in which the weight of a request in `rate` falls to 1/e.
        """
        self.rate = exp(-minutes / memory) * self.rate + paid / memory
        self.balance = min(max(0.0, self.balance + paid - price * minutes), most)
        if self.balance >= most:
            self.wanted = True
        elif self.balance <= 0.0:
            self.wanted = False
