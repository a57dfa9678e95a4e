"""The MCP server: an agent's own tools, and a SQL tool, over stdio.

One process serves one agent, who is fixed as it starts: a serial, and the key that proves it. Nothing that
a model sends can choose another. Every path fails closed: what cannot be decided, bound or recorded is an
error, and nothing has run.

- ``session.py``: the agent's session, on which no SQL of a model's ever runs.
- ``server.py``: the protocol, the tools and what they answer.
- ``sql_tool.py``: a model's SQL, each call on a connection of its own; ``login.py`` is what a login may be
  for that, and ``wire.py`` how much of an answer is read.
"""
