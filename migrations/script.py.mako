"""${message}

The SQL is beside this file, frozen: ${up_revision}_*.up.sql and .down.sql. docs/migrations.md says how to write it.
"""

from kakunin_db.migrate import run_file

revision = ${repr(up_revision).replace("'", '"')}
down_revision = ${repr(down_revision).replace("'", '"')}
branch_labels = ${repr(branch_labels).replace("'", '"')}
depends_on = ${repr(depends_on).replace("'", '"')}


def upgrade() -> None:
    run_file(__file__, "up")


def downgrade() -> None:
    run_file(__file__, "down")
