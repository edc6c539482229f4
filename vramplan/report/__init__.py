"""Results for people: terminal tables, HTML pages, JSON."""
