"""The reference service: photos, follows and a home feed on top of shardkit.

Layers, each knowing only the next: endpoints → service → repository → models. One folder per
feature; `main.create_app` puts the parts together; nothing is created at import.
"""
