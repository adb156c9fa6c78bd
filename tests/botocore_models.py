"""Imported where clients of S3 are made again and again: botocore would read the same descriptions of services, a
megabyte of JSON, for each of them."""

import functools

from botocore.loaders import JSONFileLoader
from botocore.session import get_session

_read_once = functools.cache(JSONFileLoader().load_file)
JSONFileLoader.load_file = lambda self, file_path: _read_once(file_path)
get_session().get_service_model("s3")
