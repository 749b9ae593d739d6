"""Conversations: several questions on one cache, or on a cache made anew for each."""
