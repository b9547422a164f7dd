// A request's body, from memory or from Nginx' file, piece by piece, and the turns of others between two pieces.

import fs from 'fs';
import fleet from './fleet.js';

const PIECE = 1 << 16;   // characters
const SLICE = 4;         // milliseconds of work between two turns of the others
const OPEN = '/proc/self/fd/';

// {size, length, text, piece, bytes, close} of a body: its size in bytes, its length in characters as Python's json counts them
// (bytes in UTF-8, units in UTF-16 and UTF-32), the text between two of these, the characters from one on, and its bytes.
function body(size, bytes, close) {
    const [width, big] = encoding(bytes(0, Math.min(4, size)));
    const length = Math.floor(size / width);

    function units(from, to) {
        const copy = new Uint8Array(bytes(from * width, to * width));
        const buffer = Buffer.from(copy.buffer);
        if (width === 2) {
            return new Uint16Array((big ? buffer.swap16() : buffer).buffer);
        }
        return new Uint32Array((big ? buffer.swap32() : buffer).buffer);
    }

    return {
        size,
        length,
        bytes: (from, to) => bytes(from, Math.min(to, size)),
        // Of what is not ASCII nothing but that is kept.
        piece: (from) => {
            const to = Math.min(from + PIECE, length);
            return width === 1 ? bytes(from, to) : new Uint8ClampedArray(units(from, to));
        },
        text: (from, to) => (width === 1 ? String(Buffer.from(bytes(from, to))) : textOf(units(from, to))),
        close,
    };
}

// [width in bytes, whether the high byte comes first] of a JSON text's characters, from its first bytes: Python's json guesses
// the same way.
function encoding([a, b, c, d]) {
    if (a === 0xFF && b === 0xFE) {
        return [c === 0 && d === 0 ? 4 : 2, false];
    }
    if (a === 0xFE && b === 0xFF) {
        return [2, true];
    }
    if (a === 0) {
        return [b || d === undefined ? 2 : 4, true];
    }
    return [b !== 0 ? 1 : c || d || d === undefined ? 2 : 4, false];
}

function textOf(units) {
    let text = '';
    for (let at = 0; at < units.length; at += 4096) {
        const some = units.subarray(at, at + 4096);
        text += units.BYTES_PER_ELEMENT === 2 ? String.fromCharCode.apply(null, some)
            : String.fromCodePoint.apply(null, some.map((unit) => Math.min(unit, 0x10FFFF)));
    }
    return text;
}

function inMemory(bytes) {
    return body(bytes.length, (from, to) => bytes.subarray(from, to), () => {});
}

// Nginx unlinks its file at once, so that none is ever left behind; what it has open can be opened again.
function inFile(file) {
    const name = fs.readdirSync(OPEN).find((one) => {
        try {
            return fs.readlinkSync(OPEN + one) === `${file} (deleted)`;
        } catch (e) {
            return false;   // readdirSync had it open
        }
    });
    const fd = fs.openSync(OPEN + name, 'r');
    return body(fs.fstatSync(fd).size, (from, to) => {
        const bytes = new Uint8Array(to - from);
        for (let got = 0, more = 1; more && got < bytes.length; got += more) {
            more = fs.readSync(fd, bytes, got, bytes.length - got, from + got);
        }
        return bytes;
    }, () => fs.closeSync(fd));
}

// {over, others, end} of work that takes long: whether it is others' turn, their turn, and the end of the work. Works at the
// same time wait for each other too, each at another moment: all slices together then hold up nobody.
function turns() {
    let began = Date.now();
    fleet.count('body:walks', 1);
    return {
        // A step of the clock, of either sign, ends a slice too.
        over: () => Math.abs(Date.now() - began) >= SLICE,
        // Without a millisecond the timer would fire before they have their turn.
        others: async () => {
            const wait = (fleet.number('body:walks') - 1) * SLICE * (0.5 + Math.random());
            await new Promise((resolve) => setTimeout(resolve, 1 + wait));
            began = Date.now();
        },
        end: () => fleet.count('body:walks', -1),
    };
}

export default { inMemory, inFile, turns };
