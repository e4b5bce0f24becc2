"""Masks in other trainers: one module for each library, imported only where it is asked for."""
