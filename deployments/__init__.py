"""WHERE it happens: everything that knows Ray. Start reading at app.py."""
