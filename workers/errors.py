"""One tree of errors, and what each one does to the worker.

    StreamError
    |- InvalidMessage       -> dead-letter topic, offset moves on
    |- TooManyDeadLetters   -> stop with a message: somebody deployed something wrong
    |- BrokerUnavailable    -> retried inside the client; past the deadline the worker exits
    |- TransactionAborted   -> rewind to the committed offsets, restore, go on
    |- Fenced               -> another replica has this transactional id: exit
    |- TopicMismatch        -> exit: a topic is missing or has the wrong shape
    |- BundleUnavailable    -> exit at start; while running the champion stays
    |- BarsUnavailable      -> exit: the source of bars is not installed or holds none
    |- RegistryUnavailable  -> monitor and trainer keep their writes and go on; inference needs none
    |- SchemaMismatch       -> exit: migrate the registry database first

A rejected bundle is `models.bundle.BundleRejected`: the champion stays and it is counted.
Anything else crashes the worker without a commit; restart and recovery are the same path.
"""


class StreamError(Exception):
    pass


class InvalidMessage(StreamError):
    """One message that cannot be used; it goes to the dead-letter topic with these coordinates."""

    def __init__(self, topic: str, partition: int, offset: int, reason: str) -> None:
        super().__init__(f"{topic}[{partition}]@{offset}: {reason}")
        self.topic, self.partition, self.offset, self.reason = topic, partition, offset, reason


class TooManyDeadLetters(StreamError):
    pass


class BrokerUnavailable(StreamError):
    pass


class TransactionAborted(StreamError):
    pass


class Fenced(StreamError):
    pass


class TopicMismatch(StreamError):
    pass


class BundleUnavailable(StreamError):
    pass


class BarsUnavailable(StreamError):
    pass


class RegistryUnavailable(StreamError):
    pass


class SchemaMismatch(StreamError):
    pass
