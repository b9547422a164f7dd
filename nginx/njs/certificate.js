// The end of a certificate, which Nginx itself does not tell.

// [where its content begins, where it ends] of the DER element at this place. Throws where it is none.
function element(bytes, at) {
    let length = bytes[at + 1];
    let begin = at + 2;
    if (length > 127) {
        const more = length - 128;
        length = 0;
        for (let i = 0; i < more; i++) {
            length = length * 256 + bytes[begin + i];
        }
        begin += more;
    }
    if (!(begin + length <= bytes.length)) {
        throw Error('it is no certificate');
    }
    return [begin, begin + length];
}

// A DER time, 251130094427Z or 20511130094427Z, as seconds since 1970. Two digits of a year mean 1950 to 2049.
function seconds(text) {
    const [, year, rest] = /^(\d\d|\d{4})(\d{10})Z$/.exec(text) || [];
    if (!year) {
        throw Error('its end is no time');
    }
    const [month, day, hour, minute, second] = rest.match(/../g).map(Number);
    return Date.UTC(year.length === 4 ? year : (year < '50' ? '20' : '19') + year, month - 1, day, hour, minute, second) / 1000;
}

// When the first certificate in the text of a PEM file ends, in seconds since 1970. Throws where there is none.
function end(pem) {
    const [, text] = /-----BEGIN CERTIFICATE-----([^-]+)-----END CERTIFICATE-----/.exec(pem) || [];
    const bytes = Buffer.from((text || '').replace(/\s/g, ''), 'base64');
    // Certificate ::= { tbsCertificate ::= { [0] version, serialNumber, signature, issuer, validity ::= { notBefore, notAfter } … (RFC 5280, 4.1)
    const [tbs] = element(bytes, element(bytes, 0)[0]);
    let at = bytes[tbs] === 0xa0 ? element(bytes, tbs)[1] : tbs;
    for (let skipped = 0; skipped < 3; skipped++) {
        at = element(bytes, at)[1];
    }
    const [begin, last] = element(bytes, element(bytes, element(bytes, at)[0])[1]);
    return seconds(String(bytes.subarray(begin, last)));
}

export default { end };
