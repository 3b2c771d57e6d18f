"""The peer django-tenants of `benchmarks.migrate`, in a process of its own.

    TENANTS_URL=postgresql://… python -m benchmarks.tenants N standard|multiprocessing

The schemas exist. Prints the seconds of `migrate_schemas` for ten migrations, and for none.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import make_url

from shardkit.topology import schema_name

MODELS = """
from django.db import models


class Item(models.Model):
    id = models.BigIntegerField(primary_key=True)
    owner_id = models.BigIntegerField(null=True)
    title = models.TextField(null=True)
    subtitle = models.TextField(null=True)
    views = models.BigIntegerField(db_default=0)

    class Meta:
        db_table = "items"
        indexes = [models.Index(fields=["owner_id"], name="items_owner")]


class Note(models.Model):
    id = models.BigIntegerField(primary_key=True)
    item_id = models.BigIntegerField(null=True)
    body = models.TextField(null=True)
    author_id = models.BigIntegerField(null=True)

    class Meta:
        db_table = "notes"
        indexes = [models.Index(fields=["item_id"], name="notes_item")]


class Tag(models.Model):
    id = models.BigIntegerField(primary_key=True)
    item_id = models.BigIntegerField(null=True)
    label = models.TextField(null=True)
    weight = models.BigIntegerField(db_default=1)

    class Meta:
        db_table = "tags"
        indexes = [models.Index(fields=["item_id"], name="tags_item")]
"""

CUSTOMERS = """
from django.db import models
from django_tenants.models import DomainMixin, TenantMixin


class Client(TenantMixin):
    auto_create_schema = False


class Domain(DomainMixin):
    pass
"""


def create(name: str, table: str, number: str, text: str) -> str:
    return (
        f"migrations.CreateModel('{name}', [('id', models.BigIntegerField(primary_key=True)), "
        f"('{number}', models.BigIntegerField(null=True)), "
        f"('{text}', models.TextField(null=True))], options={{'db_table': '{table}'}})"
    )


def add(model: str, field: str, kind: str) -> str:
    return f"migrations.AddField('{model}', '{field}', models.{kind})"


def index(model: str, name: str, field: str) -> str:
    return f"migrations.AddIndex('{model}', models.Index(fields=['{field}'], name='{name}'))"


OPERATIONS = (
    create("Item", "items", "owner_id", "title"),
    create("Note", "notes", "item_id", "body"),
    add("item", "subtitle", "TextField(null=True)"),
    add("item", "views", "BigIntegerField(db_default=0)"),
    add("note", "author_id", "BigIntegerField(null=True)"),
    index("item", "items_owner", "owner_id"),
    create("Tag", "tags", "item_id", "label"),
    add("tag", "weight", "BigIntegerField(db_default=1)"),
    index("note", "notes_item", "item_id"),
    index("tag", "tags_item", "item_id"),
)
"""What each migration does; `benchmarks.migrate` says the same in Alembic's words."""


def write(folder: Path) -> None:
    """Write two Django applications: the tenants, and what each of them has."""
    for name, models in (("customers", CUSTOMERS), ("things", MODELS)):
        (folder / name / "migrations").mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        (folder / name / "migrations" / "__init__.py").touch()
        (folder / name / "models.py").write_text(models)
    before = ""
    for n, operation in enumerate(OPERATIONS, start=1):
        name = f"{n:04}_step"
        (folder / "things" / "migrations" / f"{name}.py").write_text(
            "from django.db import migrations, models\n\n\n"
            "class Migration(migrations.Migration):\n"
            f"    dependencies = [{before}]\n    operations = [{operation}]\n"
        )
        before = f"('things', '{name}')"


def main(n: int, executor: str) -> None:
    import django  # noqa: PLC0415  an extra
    from django.conf import settings  # noqa: PLC0415
    from django.core.management import call_command  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        sys.path.insert(0, folder)
        url = make_url(os.environ["TENANTS_URL"])
        settings.configure(
            DATABASES={
                "default": {
                    "ENGINE": "django_tenants.postgresql_backend",
                    "NAME": url.database,
                    "USER": url.username,
                    "PASSWORD": url.password,
                    "HOST": url.host,
                    "PORT": url.port,
                }
            },
            DATABASE_ROUTERS=["django_tenants.routers.TenantSyncRouter"],
            SHARED_APPS=["django_tenants", "django.contrib.contenttypes", "customers"],
            TENANT_APPS=["things"],
            INSTALLED_APPS=[
                "django_tenants",
                "django.contrib.contenttypes",
                "customers",
                "things",
            ],
            TENANT_MODEL="customers.Client",
            TENANT_DOMAIN_MODEL="customers.Domain",
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            USE_TZ=True,
        )
        django.setup()
        quiet = {"verbosity": 0, "stdout": io.StringIO()}
        call_command("makemigrations", "customers", **quiet)
        call_command("migrate_schemas", schema_name="public", **quiet)
        from customers.models import Client  # type: ignore[import-not-found]  # noqa: PLC0415

        Client.objects.bulk_create([Client(schema_name=schema_name(k)) for k in range(n)])
        found = {}
        for what in ("10 revisions", "nothing to do"):
            start = time.perf_counter()
            call_command("migrate_schemas", tenant=True, executor=executor, **quiet)
            found[what] = time.perf_counter() - start
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
