"""The built-in model: a small vision-language model, trained from scratch on scenes rendered here."""
