"""Pure tensor functions behind the strategies: no options, no logging, inputs untouched, dimension 0 = clients."""
