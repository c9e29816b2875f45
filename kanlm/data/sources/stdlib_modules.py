"""The standard-library modules that stand for English prose and for Python code.

The list is fixed so that every machine reads the same text as far as it can: modules of
at least 1,000 characters that Python 3.11 to 3.13 share, without tests, codec tables and
what distributions package apart (tkinter, IDLE, venv, ensurepip).
"""

MODULES = """
_collections_abc _compat_pickle _compression _markupbase _py_abc _pydecimal _pyio _sitebuiltins
_strptime _threading_local _weakrefset abc argparse ast asyncio asyncio.base_events
asyncio.base_futures asyncio.base_subprocess asyncio.base_tasks asyncio.constants
asyncio.coroutines asyncio.events asyncio.exceptions asyncio.format_helpers asyncio.futures
asyncio.locks asyncio.proactor_events asyncio.protocols asyncio.queues asyncio.runners
asyncio.selector_events asyncio.sslproto asyncio.staggered asyncio.streams asyncio.subprocess
asyncio.taskgroups asyncio.tasks asyncio.timeouts asyncio.transports asyncio.trsock
asyncio.unix_events asyncio.windows_events asyncio.windows_utils base64 bdb bisect bz2 cProfile
calendar cmd code codecs codeop collections colorsys compileall concurrent.futures
concurrent.futures._base concurrent.futures.process concurrent.futures.thread configparser
contextlib copy copyreg csv ctypes ctypes._aix ctypes._endian ctypes.macholib.dyld
ctypes.macholib.framework ctypes.util ctypes.wintypes curses curses.ascii curses.has_key
curses.textpad dataclasses datetime dbm dbm.dumb difflib dis doctest email email._encoded_words
email._header_value_parser email._parseaddr email._policybase email.base64mime email.charset
email.contentmanager email.encoders email.errors email.feedparser email.generator email.header
email.headerregistry email.iterators email.message email.mime.application email.mime.audio
email.mime.image email.mime.message email.mime.multipart email.mime.text email.parser
email.policy email.quoprimime email.utils enum filecmp fileinput fnmatch fractions ftplib
functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html
html.entities html.parser http http.client http.cookiejar http.cookies http.server imaplib
importlib importlib._abc importlib._bootstrap importlib._bootstrap_external importlib.abc
importlib.metadata importlib.metadata._adapters importlib.metadata._functools
importlib.metadata._itertools importlib.metadata._meta importlib.metadata._text
importlib.resources._adapters importlib.resources._common importlib.resources.abc
importlib.resources.readers importlib.resources.simple importlib.util inspect io ipaddress json
json.decoder json.encoder json.scanner json.tool keyword linecache locale logging logging.config
logging.handlers lzma mailbox mimetypes modulefinder multiprocessing.connection
multiprocessing.context multiprocessing.dummy multiprocessing.dummy.connection
multiprocessing.forkserver multiprocessing.heap multiprocessing.managers multiprocessing.pool
multiprocessing.popen_fork multiprocessing.popen_forkserver multiprocessing.popen_spawn_posix
multiprocessing.popen_spawn_win32 multiprocessing.process multiprocessing.queues
multiprocessing.reduction multiprocessing.resource_sharer multiprocessing.resource_tracker
multiprocessing.shared_memory multiprocessing.sharedctypes multiprocessing.spawn
multiprocessing.synchronize multiprocessing.util netrc ntpath nturl2path numbers opcode operator
optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
profile pstats pty py_compile pyclbr pydoc queue quopri random re re._casefix re._compiler
re._constants re._parser reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil
signal site smtplib socket socketserver sqlite3 sqlite3.dbapi2 sqlite3.dump ssl stat statistics
string stringprep subprocess symtable sysconfig tabnanny tarfile tempfile textwrap this
threading timeit token tokenize tomllib._parser tomllib._re trace traceback tracemalloc
types typing unittest unittest._log unittest.async_case unittest.case unittest.loader
unittest.main unittest.mock unittest.result unittest.runner unittest.signals unittest.suite
unittest.util urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid
warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server
wsgiref.types wsgiref.util wsgiref.validate xml.dom xml.dom.domreg xml.dom.expatbuilder
xml.dom.minicompat xml.dom.minidom xml.dom.pulldom xml.dom.xmlbuilder xml.etree
xml.etree.ElementInclude xml.etree.ElementPath xml.etree.ElementTree xml.sax xml.sax._exceptions
xml.sax.expatreader xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
xmlrpc.server zipapp zipfile zipimport zoneinfo._common zoneinfo._tzpath zoneinfo._zoneinfo
""".split()  # noqa: SIM905
