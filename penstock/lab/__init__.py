"""The laboratory: cards, systems, runs, claims, cost, reports."""
