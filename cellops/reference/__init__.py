"""Eager oracles, one per op, in the order of the formula. They import only torch and define what is correct."""
