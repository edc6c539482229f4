"""One file a kind of block: what it saves for backward and what its backward needs."""
