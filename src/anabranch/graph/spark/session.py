"""A Spark session that works: the caller's, the active one, or one on the cores of this machine."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anabranch
from anabranch import machine
from anabranch.errors import BackendError
from anabranch.extras import require
from anabranch.graph.spark.files import first_line

UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@contextmanager
def session(given: Any = None, partitions: int | None = None) -> Iterator[Any]:
    """Yield a session whose shuffles have ``partitions``. One that is made here is stopped afterwards; settings of another are put back.

    Raises BackendError where pyspark, pandas or Java is missing, the session does not start, or Spark fails at what is done with it.
    """
    check_packages()
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    found = given or SparkSession.getActiveSession()
    made = found is None
    if made:
        check_java()
        found = _start(SparkSession)
    # 200 tasks for a sum take seconds.
    changed = {
        # It would join partitions that are made to stay apart.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.shuffle.partitions": str(partitions or default_partitions(found)),
        # What is sent to all executors goes through the driver, which is to hold no part of a graph; small tables are sent by hand.
        "spark.sql.autoBroadcastJoinThreshold": "-1",
    }
    before = {name: found.conf.get(name, None) for name in changed}
    for name, value in changed.items():
        found.conf.set(name, value)
    try:
        yield found
    except (Py4JError, PySparkException) as error:
        raise BackendError(f"Spark failed: {first_line(error)}") from error
    finally:
        if made:
            found.stop()
        else:
            for name, value in before.items():
                found.conf.unset(name) if value is None else found.conf.set(name, value)


def default_partitions(spark: Any) -> int:
    """Two per core."""
    return 2 * spark.sparkContext.defaultParallelism


def check_packages() -> None:
    """Raises BackendError naming the extra where a package is missing."""
    require("spark", by="engine 'spark' (engine='local' works without)")


def check_java() -> None:
    """Raises BackendError where there is no Java to start Spark with."""
    home = os.environ.get("JAVA_HOME")
    if shutil.which("java") is None and not (home and (Path(home) / "bin" / "java").exists()):
        raise BackendError("engine 'spark' needs Java 17: there is no `java` on the path, and JAVA_HOME names none")


def _start(builder_of: Any) -> Any:
    """A session on all cores of this machine. Without these settings workers start another interpreter, or look for the host's name."""
    settings = {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    before = {name: os.environ.get(name) for name in settings}
    paths = [str(Path(anabranch.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ.update(settings)
    try:
        found = (
            builder_of.builder.master("local[*]")
            .appName("anabranch graph")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.executorEnv.PYTHONPATH", os.pathsep.join(path for path in paths if path))
            .getOrCreate()
        )
    except Exception as error:
        raise BackendError(f"Spark does not start: {str(error).strip().splitlines()[0]}") from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    # What fails is raised here, in a line; executors would write Java's stacks to the terminal beside.
    found.sparkContext.setLogLevel("FATAL")
    return found


def executor_bytes(spark: Any) -> int:
    """What an executor may use: ``spark.executor.memory``; on one machine, where workers are processes of it, the machine's memory."""
    master = spark.conf.get("spark.master", "")
    if master.startswith("local") and not master.startswith("local-cluster"):
        return machine.room_bytes()
    return spark_bytes(spark.conf.get("spark.executor.memory", "1g"))


def spark_bytes(text: str) -> int:
    """Bytes of Spark's "512m", "4g", "2048" (MiB)."""
    text = text.strip().lower().removesuffix("b") or "1g"
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text) * UNITS["m"]
