"""What shares of passed items say: intervals, and paired differences."""

import math


def wilson(passed: int, n: int) -> tuple[float, float]:
  """95 % score interval of a proportion (Wilson, 1927).

  wilson(8, 10) is (0.490, 0.943); unlike the normal interval it stays within
  [0, 1] and is of use at 0 and at n.
  """
  z = 1.959963984540054
  centre = passed + z * z / 2
  half = z * math.sqrt(passed * (n - passed) / n + z * z / 4)
  low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
  return max(low, 0.0), min(high, 1.0)


def mcnemar(gained: int, lost: int) -> float:
  """Exact two-sided p of the discordant pairs under a fair coin.

  mcnemar(5, 0) is 2 / 2^5 = 0.0625; with no change it is 1.
  """
  n = gained + lost
  tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
  return min(1.0, 2 * tail / 2**n)
