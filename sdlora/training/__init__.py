"""From a configuration to a trained adapter: plan, prepare, loop, finish."""
