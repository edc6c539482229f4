"""Choice: the candidates, which of them are legal and fit, and the fastest."""
