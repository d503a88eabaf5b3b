"""Flags, concepts and checks: all that can be settled before anything heavy is imported."""
