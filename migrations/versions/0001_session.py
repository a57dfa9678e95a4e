"""The kit: all of `sql/` but what only a superuser installs.

The SQL is beside this file, frozen: 0001_session.up.sql and .down.sql.
"""

from kakunin_db.migrate import run_file

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_file(__file__, "up")


def downgrade() -> None:
    run_file(__file__, "down")
