"""A mixture of experts: the router's choice, the exchange of tokens, the experts' products."""

from wsekern.kernels.experts.experts import experts as experts
