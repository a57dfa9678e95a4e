"""``kakunin-db serve``: the REST API that the published SDK (``kakunin`` on PyPI) speaks, over the functions
in the database.

models.py says what is asked and answered, routes.py by which path and with which scope; app.py is the ASGI
application, and its OpenAPI document is made from those two. backend.py has the connections, one pool a role;
operations.py what is done there beyond :mod:`kakunin_db.client`. Needs the extra ``serve``.
"""
