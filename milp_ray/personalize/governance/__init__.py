"""The care that personal data needs: consent, retention, forgetting, and showing that nothing is left."""
