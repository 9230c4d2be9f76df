"""Token rows from JSONL text, compiled: the fast twin of `token_rows.parse_row`.

    parse_lines      a block of lines -> columns, until the end or until a line that the twin
                     must read
      parse_line     one object: known fields into `scratch` or marked, everything else skipped
                     but checked
      write_row      token_0 + image + token_1 end to end, target spans, texts

It knows JSON's whole grammar for what it skips, and for what it takes only the shapes that rows
have: lists of integers from 0 to 10^7 - 1, texts without escapes. A line with anything else is left
to the twin (a return of -1), which takes it or says what is wrong with it. So what is accepted here
must be exactly what the twin would have made of it, and nothing here reports an error.

Every loop ends at a byte that is not allowed in its place; a line ends in a newline, which is
allowed nowhere inside.

Most bytes are looked at eight at a time: `words[n]` is `data[n:n + 8]` as one integer, the first
byte lowest. Arithmetic on all bytes of a word at once follows Anderson, Bit Twiddling Hacks, and
Lemire, "Quickly parsing eight digits" (2018).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

# Nothing here allocates. Without numba's reference counts, which are atomic, a call with three
# arrays is 50 ns cheaper; the option is not in numba's manual (it is in its CPUTargetOptions), and
# a numba that no longer knows it says so when compiling.
_kernel = numba.njit(cache=True, nogil=True, _nrt=False)

LEFT_TO_THE_TWIN = -1
ABSENT, IS_NULL = -1, -2  # for a field's place; both count as empty ranges
ZERO_, ONE, THREE, SEVEN, EIGHT, TEN, SIXTEEN, DIGIT_0 = (
    np.uint64(value) for value in (0, 1, 3, 7, 8, 10, 16, 48)
)
MAX_DEPTH = 60  # of what is skipped: the kinds of the open brackets are bits of one integer

QUOTE, BACKSLASH, COMMA, COLON, NEWLINE, MINUS, POINT, ZERO = 34, 92, 44, 58, 10, 45, 46, 48
OPEN_LIST, CLOSE_LIST, OPEN_OBJECT, CLOSE_OBJECT = 91, 93, 123, 125

FIELDS = (
    "token_0",
    "token_1",
    "token_image",
    "token_image_new",
    "target_spans",
    "id",
    "image",
    "category",
)
TOKEN_0, TOKEN_1, CODES, MERGED, SPANS, ID, IMAGE, CATEGORY = range(8)
NUM_LISTS = 5  # the first fields are lists of integers
_NAMES = np.array([list(name.encode().ljust(16)) for name in FIELDS], np.uint8)
_NAME_SIZES = np.array([len(name) for name in FIELDS])
_LITERALS = np.array([list(word.encode().ljust(8)) for word in ("true", "false", "null")], np.uint8)
_LITERAL_SIZES = np.array([4, 5, 4])
_ESCAPES = np.array([byte in b'"\\/bfnrt' for byte in range(256)])
_PLAIN = np.array([32 <= byte < 128 and byte not in b'"\\' for byte in range(256)])
_DEFAULT_CATEGORY, _ALL_OF_IT = np.frombuffer(b"default", np.uint8), np.array([0, 7])


WORD_BYTES = 8
EVERY_BYTE, HIGH_BITS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
SPACES, QUOTES, BACKSLASHES = (EVERY_BYTE * np.uint64(byte) for byte in (32, QUOTE, BACKSLASH))
ZEROS, SIXES, HIGH_NIBBLES = (EVERY_BYTE * np.uint64(byte) for byte in (DIGIT_0, 0x06, 0xF0))
ZEROS_AND_COMMA, SIX_SIXES = np.uint64(0x2C303030303030), np.uint64(0x060606060606)
HIGH_NIBBLES_OF_SIX, FIRST_OF_SIX_DIGITS = np.uint64(0xFFF0F0F0F0F0F0), np.uint64(100_000)
PAIRS, WEIGHTS_OF_PAIRS = (
    np.uint64(0xFF000000FF),
    (np.uint64(0xF424000000064), np.uint64(0x271000000001)),
)
LOW_NIBBLE, LOW_BYTE, WHOLE_BYTES, BEFORE_LAST_BYTE, ALL_BITS = (
    np.uint64(value) for value in (15, 255, 0x78, 56, 64)
)
SPACE = np.uint64(32)
NO_BITS, ONE_BIT = np.uint64(0), np.uint64(1)
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # RFC 9923
MANY = np.uint64(16)  # ids that are parsed at once
BUT_THE_LAST = MANY - np.uint64(1)
BYTES_AHEAD = (
    160  # so many bytes behind what is parsed may be looked at: MANY times 8 and a word, rounded up
)


def words_of(data: np.ndarray) -> np.ndarray:
    """`words[n]` is `data[n:n + 8]`: a view `[len(data) - 7]` uint64 of bytes that may start
    anywhere.
    """
    return np.ndarray(len(data) - WORD_BYTES + 1, "<u8", data, strides=(1,))


class Buffers(NamedTuple):
    """Room for rows, end to end; row n of a list lies at `starts[n] … starts[n + 1]`. `scratch`
    holds one line's integers.
    """

    place: np.ndarray  # int64 [8, 2]: where the fields of one line are
    scratch: np.ndarray  # int32
    ids: np.ndarray  # int32
    id_starts: np.ndarray  # int64
    spans: np.ndarray  # int32
    span_starts: np.ndarray  # int64
    text: np.ndarray  # uint8 [3, room]: id, image, category
    text_starts: np.ndarray  # int32 [3, room]


class Images(NamedTuple):
    """What it takes to compare a row's merged image with its codes; nothing is compared when the
    vBPE is not known.
    """

    is_known: bool
    first_id: int  # of the image ids in the vocabulary
    boi_id: int
    num_codes: int
    starts: np.ndarray  # int64 [V + 1]: the cells of id n are those from starts[n] on
    dy: np.ndarray  # int32
    dx: np.ndarray  # int32
    codes: np.ndarray  # int32
    # int32 [V, 3]: how far an id reaches down, to the left (not above 0) and to the right of its
    # anchor
    boxes: np.ndarray
    covered: np.ndarray  # uint64: a bit for a cell of the largest image that is compared here


@_kernel
def parse_lines(
    data: np.ndarray,
    words: np.ndarray,
    at: int,
    stop: int,
    buffers: Buffers,
    images: Images,
    row: int,
) -> tuple[int, int]:
    """Rows of the lines in `data[at:stop]`, whole ones, from row number `row` on. Returns (where
    it stopped, rows now).

    It stops before `stop` at a line that is left to the twin. `words` are those of `data`, which
    goes on for 7 bytes or more behind `stop`.
    """
    place = buffers.place
    while at < stop:
        if data[at] == NEWLINE:
            at += 1
            continue
        end = parse_line(data, words, at, buffers.scratch, place)
        if end < 0 or not write_row(data, buffers, images, place, row):
            return at, row
        at, row = end, row + 1
    return at, row


@_kernel
def parse_line(
    data: np.ndarray, words: np.ndarray, at: int, scratch: np.ndarray, place: np.ndarray
) -> int:
    """One object and its newline. `place[field]` becomes the range in `scratch` (lists) or in
    `data` (texts).
    """
    place[:] = ABSENT
    size = 0
    if data[at] != OPEN_OBJECT:
        return LEFT_TO_THE_TWIN
    at = skip_space(data, at + 1)
    while True:
        name = at + 1
        at = skip_key(data, at)
        if at < 0:
            return LEFT_TO_THE_TWIN
        field = find_field(data, name)
        if field >= 0 and place[field, 0] != ABSENT:  # a name twice
            return LEFT_TO_THE_TWIN
        if field >= 0 and field < NUM_LISTS and data[at] == OPEN_LIST:
            end, new_size = parse_integers(data, words, at, scratch, size)
            place[field, 0], place[field, 1] = size, new_size
            at, size = end, new_size
        elif field < 0:
            at = skip_value(data, words, at)
        elif field >= NUM_LISTS and data[at] == QUOTE:
            start, at = at + 1, find_end_of_plain_text(data, at)
            place[field, 0], place[field, 1] = start, at - 1
        elif field == IMAGE and data[at] == OPEN_LIST:
            start, at = at, skip_plain_texts(data, at)
            place[field, 0], place[field, 1] = start, at
        elif field == ID:
            start, at = at, skip_scalar(data, at)
            if data[start] < ZERO or data[start] > 57 or not is_integer(data, start, at):
                return LEFT_TO_THE_TWIN
            place[field, 0], place[field, 1] = start, at
        else:
            start, at = at, skip_scalar(data, at)
            if data[start] != 110:
                return LEFT_TO_THE_TWIN
            place[field] = IS_NULL
        if at < 0:
            return LEFT_TO_THE_TWIN
        at = skip_space(data, at)
        if data[at] == CLOSE_OBJECT:
            break
        if data[at] != COMMA:
            return LEFT_TO_THE_TWIN
        at = skip_space(data, at + 1)
    at = skip_space(data, at + 1)
    return at + 1 if data[at] == NEWLINE else LEFT_TO_THE_TWIN


@_kernel
def write_row(
    data: np.ndarray, buffers: Buffers, images: Images, place: np.ndarray, row: int
) -> bool:
    """Whether the marked fields are a row, whose merged image stands for its codes; then it is
    row number `row`.
    """
    if place[TOKEN_0, 0] < 0 or place[TOKEN_1, 0] < 0 or place[ID, 0] < 0:
        return False
    has_merged = place[MERGED, 0] >= 0
    if (
        images.is_known
        and has_merged
        and place[CODES, 0] >= 0
        and not images_fit(buffers.scratch, place, images)
    ):
        return False
    at = copy(buffers.scratch, place[TOKEN_0], buffers.ids, buffers.id_starts[row])
    at = copy(buffers.scratch, place[MERGED if has_merged else CODES], buffers.ids, at)
    answer = at
    at = copy(buffers.scratch, place[TOKEN_1], buffers.ids, at)
    buffers.id_starts[row + 1] = at
    spans_at = buffers.span_starts[row]
    if place[SPANS, 0] >= 0:
        spans_at = copy(buffers.scratch, place[SPANS], buffers.spans, spans_at)
    else:
        buffers.spans[spans_at] = answer - buffers.id_starts[row]
        buffers.spans[spans_at + 1] = at - buffers.id_starts[row]
        spans_at += 2
    buffers.span_starts[row + 1] = spans_at
    for column in range(3):
        start = buffers.text_starts[column, row]
        end = copy(data, place[ID + column], buffers.text[column], start)
        if column == 2 and end == start:
            end = copy(_DEFAULT_CATEGORY, _ALL_OF_IT, buffers.text[column], start)
        buffers.text_starts[column, row + 1] = end
    return True


@_kernel
def copy(source: np.ndarray, place: np.ndarray, target: np.ndarray, at: int) -> int:
    """`source[place[0]:place[1]]` to `target[at:]`; returns where it ends. A slice assignment
    costs more than most texts.
    """
    start, size = place[0], place[1] - place[0]
    for n in range(size):
        target[at + n] = source[start + n]
    return at + size


@_kernel
def hash_texts(text: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
    """`out[n]` becomes the 64-bit FNV-1a hash of `text[starts[n]:starts[n + 1]]`."""
    for row in range(len(out)):
        value = FNV_OFFSET
        for at in range(starts[row], starts[row + 1]):
            value = (value ^ np.uint64(text[at])) * FNV_PRIME
        out[row] = value


# ---- merged images ----


@_kernel
def images_fit(scratch: np.ndarray, place: np.ndarray, images: Images) -> bool:
    """Whether the merged image stands for the codes, and every one that follows in token_1 fills
    a grid as large.
    """
    stream, expected = (
        scratch[place[MERGED, 0] : place[MERGED, 1]],
        scratch[place[CODES, 0] : place[CODES, 1]],
    )
    if not image_fits(stream, expected, images, True):
        return False
    after = scratch[place[TOKEN_1, 0] : place[TOKEN_1, 1]]
    for at in range(len(after)):
        if after[at] == images.boi_id:
            end = at + 1
            while end < len(after) and after[end] >= images.first_id:
                end += 1
            # One at the end of its row may be cut.
            if end < len(after) and not image_fits(after[at + 1 : end], expected, images, False):
                return False
    return True


@_kernel
def image_fits(stream: np.ndarray, expected: np.ndarray, images: Images, compares: bool) -> bool:
    """Whether the stream fills as many cells as `expected` has codes and, if it `compares`,
    stands for them.
    """
    side = int(np.sqrt(len(expected)) + 0.5)
    if side * side != len(expected):
        return has_same_number_of_cells(stream, expected, images)
    return len(expected) <= 64 * len(images.covered) and stands_for(
        stream, expected, side, images, compares
    )


@_kernel
def has_same_number_of_cells(stream: np.ndarray, expected: np.ndarray, images: Images) -> bool:
    """Whether the stream covers as many cells as there are codes, and they are codes."""
    num_cells = 0
    for i in range(len(stream)):
        image_id = np.int64(stream[i]) - images.first_id
        if image_id < 0 or image_id >= len(images.boxes):
            return False
        num_cells += images.starts[image_id + 1] - images.starts[image_id]
    for i in range(len(expected)):
        code = np.int64(expected[i]) - images.first_id
        if code < 0 or code >= images.num_codes:
            return False
    return num_cells == len(expected)


@_kernel
def stands_for(
    stream: np.ndarray, expected: np.ndarray, side: int, images: Images, compares: bool
) -> bool:
    """`VisualBPE.decode` of a square grid, with a comparison, if it `compares`, in place of the
    grid.

    `free` holds the cells of the current 64 that are not covered yet, so that the next one is found
    without a loop.
    """
    covered, num_words = images.covered, (len(expected) + 63) // 64
    for n in range(num_words):
        covered[n] = NO_BITS
    if len(expected) % 64:
        covered[num_words - 1] = ~NO_BITS << np.uint64(
            len(expected) % 64
        )  # cells that there are not
    word, num_cells = 0, 0
    free = ~covered[0] if num_words else NO_BITS
    for i in range(len(stream)):
        while free == NO_BITS:
            word += 1
            if word >= num_words:
                return False
            free = ~covered[word]
        cell = word * 64 + np.int64(trailing_zeros(free))
        image_id = np.int64(stream[i]) - images.first_id
        if image_id < 0 or image_id >= len(images.boxes):
            return False
        if image_id < images.num_codes:  # most are single codes
            if compares and expected[cell] != stream[i]:
                return False
            free &= free - ONE_BIT
            num_cells += 1
            continue
        y = cell // side
        x = cell - y * side
        box = images.boxes[image_id]
        if y + box[0] >= side or x + box[1] < 0 or x + box[2] >= side:
            return False
        start, stop = images.starts[image_id], images.starts[image_id + 1]
        for part in range(start, stop):
            place = cell + images.dy[part] * side + images.dx[part]
            bit = ONE_BIT << np.uint64(place & 63)
            if compares and expected[place] - images.first_id != images.codes[part]:
                return False
            if place >> 6 == word:
                if not free & bit:
                    return False
                free ^= bit
            elif covered[place >> 6] & bit:
                return False
            else:
                covered[place >> 6] |= bit
        num_cells += stop - start
    return num_cells == len(expected)


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """How many of a word's lowest bits are zero, 64 of zero: one instruction, which numba has no
    name for.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), generate


# ---- JSON ----


@_kernel
def skip_space(data: np.ndarray, at: int) -> int:
    while data[at] == 32 or data[at] == 9 or data[at] == 13:
        at += 1
    return at


@_kernel
def find_field(data: np.ndarray, start: int) -> int:
    """Which of FIELDS the text that starts at `start` is, -1 for none."""
    for field in range(len(_NAME_SIZES)):
        size = _NAME_SIZES[field]
        same = 0
        while same < size and data[start + same] == _NAMES[field, same]:
            same += 1
        if same == size and data[start + size] == QUOTE:
            return field
    return -1


@_kernel
def skip_key(data: np.ndarray, at: int) -> int:
    """Behind a key and its colon. A key with escapes could spell a known field: it is left to
    the twin.
    """
    if data[at] != QUOTE:
        return LEFT_TO_THE_TWIN
    at = find_end_of_plain_text(data, at)
    if at < 0:
        return LEFT_TO_THE_TWIN
    at = skip_space(data, at)
    return skip_space(data, at + 1) if data[at] == COLON else LEFT_TO_THE_TWIN


@_kernel
def find_end_of_plain_text(data: np.ndarray, at: int) -> int:
    """Behind the closing quote of a text without escapes."""
    at += 1
    while True:
        if _PLAIN[data[at]]:
            at += 1
        elif data[at] == QUOTE:
            return at + 1
        else:
            size = utf8_size(data, at)
            if size == 0:
                return LEFT_TO_THE_TWIN
            at += size


@_kernel
def skip_plain_texts(data: np.ndarray, at: int) -> int:
    """Behind a list of texts without escapes, and without a space between them: it is its own
    shortest JSON.
    """
    while True:
        if data[at + 1] != QUOTE:
            return LEFT_TO_THE_TWIN
        at = find_end_of_plain_text(data, at + 1)
        if at < 0 or (data[at] != COMMA and data[at] != CLOSE_LIST):
            return LEFT_TO_THE_TWIN
        if data[at] == CLOSE_LIST:
            return at + 1


@_kernel
def skip_text(data: np.ndarray, words: np.ndarray, at: int) -> int:
    """Behind the closing quote of any text but one with escaped surrogates."""
    at += 1
    at = skip_plain_words(words, at)
    while True:
        if _PLAIN[data[at]]:
            at += 1
        elif data[at] == QUOTE:
            return at + 1
        elif data[at] == BACKSLASH:
            if _ESCAPES[data[at + 1]]:
                at += 2
            elif is_escaped_character(data, at):
                at += 6
            else:
                return LEFT_TO_THE_TWIN
            at = skip_plain_words(words, at)
        else:
            size = utf8_size(data, at)
            if size == 0:
                return LEFT_TO_THE_TWIN
            at += size


@_kernel
def skip_plain_words(words: np.ndarray, at: int) -> int:
    """Behind as many eights of bytes as are ASCII, not below a space, and neither a quote nor a
    backslash.
    """
    while True:
        word = words[at]
        quotes, backslashes = word ^ QUOTES, word ^ BACKSLASHES  # zero bytes where there is one
        below = (
            ((word - SPACES) & ~word)
            | ((quotes - EVERY_BYTE) & ~quotes)
            | ((backslashes - EVERY_BYTE) & ~backslashes)
        )
        if (word | below) & HIGH_BITS:
            return at
        at += WORD_BYTES


@_kernel
def is_escaped_character(data: np.ndarray, at: int) -> bool:
    """Whether `\\uXXXX` stands there, other than a surrogate (D800 … DFFF)."""
    if data[at + 1] != 117:
        return False
    value = np.int64(0)
    for place in range(at + 2, at + 6):
        digit = np.int64(data[place]) | 32  # lower case; digits stay
        if digit >= 48 and digit <= 57 and data[place] >= 48:
            value = value * 16 + digit - 48
        elif digit >= 97 and digit <= 102:
            value = value * 16 + digit - 87
        else:
            return False
    return bool(value < 0xD800 or value > 0xDFFF)


@_kernel
def utf8_size(data: np.ndarray, at: int) -> int:
    """Bytes of the character of two or more bytes at `at`, 0 when there is none (Unicode 15,
    table 3-7).
    """
    first = data[at]
    if first < 0xC2 or first > 0xF4:
        return 0
    size = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    low, high = 0x80, 0xBF
    if first == 0xE0:
        low = 0xA0
    elif first == 0xED:
        high = 0x9F
    elif first == 0xF0:
        low = 0x90
    elif first == 0xF4:
        high = 0x8F
    if data[at + 1] < low or data[at + 1] > high:
        return 0
    for place in range(at + 2, at + size):
        if data[place] < 0x80 or data[place] > 0xBF:
            return 0
    return size


@_kernel
def parse_integers(
    data: np.ndarray, words: np.ndarray, at: int, out: np.ndarray, size: int
) -> tuple[int, int]:
    """A list of integers, or a list of such lists laid end to end, into `out[size:]`. Returns
    (behind it, the new size).
    """
    at = skip_space(data, at + 1)
    if data[at] != OPEN_LIST:
        return parse_flat_integers(data, words, at, out, size)
    while data[at] == OPEN_LIST:
        at, size = parse_flat_integers(data, words, skip_space(data, at + 1), out, size)
        if at < 0:
            break
        at = skip_space(data, at)
        if data[at] == CLOSE_LIST:
            return at + 1, size
        if data[at] != COMMA:
            break
        at = skip_space(data, at + 1)
    return LEFT_TO_THE_TWIN, size


@_kernel
def parse_flat_integers(
    data: np.ndarray, words: np.ndarray, start: int, out: np.ndarray, size: int
) -> tuple[Any, Any]:
    """From behind the opening bracket. Nine bytes in ten pass here, nearly all of them as six
    digits and a comma, which is what an image token is. Unsigned places spare the test for
    indices from the end. More than 7 digits are left to the twin.
    """
    if data[start] == CLOSE_LIST:
        return start + 1, size
    at, entry = np.uint64(start), np.uint64(size)
    while True:
        while data[at] == SPACE:
            at += ONE
        word = words[at]
        stride = SEVEN + np.uint64(word >> BEFORE_LAST_BYTE == SPACE)
        last = words[at + BUT_THE_LAST * stride]
        may_be_many = (
            others_than_six_digits_and_comma(word) | others_than_six_digits_and_comma(last)
        ) == ZERO_
        if may_be_many and parse_many(words, at, stride, out, entry):
            at += MANY * stride
            entry += MANY
            continue
        others = others_than_digits(word)
        num_bits = trailing_zeros(others) & WHOLE_BYTES  # of the digits before the first other byte
        has_zero_first = (word & LOW_NIBBLE == ZERO_) & (num_bits > EIGHT)
        if others == ZERO_ or num_bits == ZERO_ or has_zero_first:
            return LEFT_TO_THE_TWIN, size
        out[entry] = np.int32(eight_digits((word ^ ZEROS) << (ALL_BITS - num_bits)))
        entry += ONE
        after = np.uint8((word >> num_bits) & LOW_BYTE)
        at += (num_bits >> THREE) + ONE
        if after != COMMA:
            return (
                (np.int64(at), np.int64(entry))
                if after == CLOSE_LIST
                else (np.int64(LEFT_TO_THE_TWIN), np.int64(size))
            )


@_kernel
def parse_many(words: np.ndarray, at: int, stride: int, out: np.ndarray, entry: int) -> bool:
    """MANY times six digits, a comma, and with a stride of 8 a space, into `out[entry:]`; free
    of branches, so that the compiler takes vector instructions. Returns False when one of them
    is something else; what it has written then means nothing.
    """
    wrong, has_space = ZERO_, stride == EIGHT
    for n in range(MANY):
        word = words[at + np.uint64(n) * stride]
        value = eight_digits((word ^ ZEROS) << SIXTEEN)
        wrong |= others_than_six_digits_and_comma(word) | np.uint64(value < FIRST_OF_SIX_DIGITS)
        wrong |= np.uint64(has_space & (word >> BEFORE_LAST_BYTE != SPACE))
        out[entry + np.uint64(n)] = np.int32(value)
    return bool(wrong == ZERO_)


@_kernel
def others_than_six_digits_and_comma(word: int) -> np.uint64:
    """Zero when the first seven bytes are those: 0x30 … 0x39 become 0x00 … 0x09, the comma 0x00;
    0x0A and more pass 0x0F.
    """
    nibbles = word ^ ZEROS_AND_COMMA
    return (nibbles | (nibbles + SIX_SIXES)) & HIGH_NIBBLES_OF_SIX


@_kernel
def others_than_digits(word: int) -> np.uint64:
    """High nibbles that are not zero: the lowest lies in the first byte that is no digit, those
    behind it mean nothing.
    """
    nibbles = word ^ ZEROS
    return (nibbles | (nibbles + SIXES)) & HIGH_NIBBLES


@_kernel
def eight_digits(digits: int) -> np.uint64:
    """The number of eight digits, one a byte: pairs of them first, then pairs of pairs. Zeros
    may come first.
    """
    pairs = digits * TEN + (digits >> EIGHT)
    low, high = pairs & PAIRS, (pairs >> SIXTEEN) & PAIRS
    return (low * WEIGHTS_OF_PAIRS[0] + high * WEIGHTS_OF_PAIRS[1]) >> np.uint64(32)


@_kernel
def is_integer(data: np.ndarray, start: int, end: int) -> bool:
    """Whether a number is written with at most 18 digits and nothing else."""
    at = start
    while at < end and data[at] >= ZERO and data[at] <= 57:
        at += 1
    return at == end and end - start <= 18


@_kernel
def skip_scalar(data: np.ndarray, at: int) -> int:
    """Behind true, false, null or a number without an exponent and of at most 18 digits before
    the point.
    """
    for literal in range(len(_LITERAL_SIZES)):
        same = 0
        while same < _LITERAL_SIZES[literal] and data[at + same] == _LITERALS[literal, same]:
            same += 1
        if same == _LITERAL_SIZES[literal]:
            return at + same
    if data[at] == MINUS:
        at += 1
    start = at
    while data[at] >= ZERO and data[at] <= 57:
        at += 1
    if at == start or at - start > 18 or (at - start > 1 and data[start] == ZERO):
        return LEFT_TO_THE_TWIN
    if data[at] == POINT:
        at += 1
        if data[at] < ZERO or data[at] > 57:
            return LEFT_TO_THE_TWIN
        while data[at] >= ZERO and data[at] <= 57:
            at += 1
    return at


@_kernel
def skip_value(data: np.ndarray, words: np.ndarray, at: int) -> int:
    """Behind any value. The kinds of the open brackets are bits of `objects`, the innermost
    last.
    """
    objects, depth = 0, 0
    while True:
        if data[at] == OPEN_OBJECT or data[at] == OPEN_LIST:
            is_object = data[at] == OPEN_OBJECT
            if depth == MAX_DEPTH:
                return LEFT_TO_THE_TWIN
            objects, depth = objects * 2 + is_object, depth + 1
            at = skip_space(data, at + 1)
            if data[at] != (CLOSE_OBJECT if is_object else CLOSE_LIST):
                at = skip_key(data, at) if is_object else at
                if at < 0:
                    return LEFT_TO_THE_TWIN
                continue
        else:
            at = skip_text(data, words, at) if data[at] == QUOTE else skip_scalar(data, at)
            if at < 0:
                return LEFT_TO_THE_TWIN
        while True:  # a value has ended, or an empty bracket is about to
            if depth == 0:
                return at
            at = skip_space(data, at)
            if data[at] == (CLOSE_OBJECT if objects & 1 else CLOSE_LIST):
                at, objects, depth = at + 1, objects >> 1, depth - 1
                continue
            if data[at] != COMMA:
                return LEFT_TO_THE_TWIN
            at = skip_space(data, at + 1)
            at = skip_key(data, at) if objects & 1 else at
            if at < 0:
                return LEFT_TO_THE_TWIN
            break
