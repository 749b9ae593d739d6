"""`plphp profile`: what pruning buys on a model, prompts and machine. It composes; it never prints."""
