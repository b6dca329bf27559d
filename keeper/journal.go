package keeper

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// A journal in the descriptor store is a file with two places. What is new of a mount
// is written to the one that has the older of two versions, so that one is whole at any
// moment at which the keeper may be killed:
//
//	at 0, and at journalPlace:
//	 0  u64  version, from 1 on; little-endian
//	 8  u32  bytes of the body
//	12  u32  CRC-32 (IEEE) of these 12 bytes and the body
//	16       body: the Mount, JSON
const (
	journalHeader = 16
	journalPlace  = 256 << 10 // maxPacket and more
)

var errJournal = errors.New("neither version of the journal is whole")

// readPlace returns what a place has, version 0 if it is not whole.
func readPlace(r io.ReaderAt, place int) (version uint64, body []byte) {
	at := int64(place) * journalPlace
	var h [journalHeader]byte
	if _, err := r.ReadAt(h[:], at); err != nil {
		return 0, nil
	}
	size := binary.LittleEndian.Uint32(h[8:])
	if size > maxPacket {
		return 0, nil
	}
	body = make([]byte, size)
	if _, err := r.ReadAt(body, at+journalHeader); err != nil {
		return 0, nil
	}
	sum := crc32.Update(crc32.ChecksumIEEE(h[:12]), crc32.IEEETable, body)
	if sum != binary.LittleEndian.Uint32(h[12:]) {
		return 0, nil
	}
	return binary.LittleEndian.Uint64(h[:]), body
}

// readJournal returns the newest whole version of a mount.
func readJournal(r io.ReaderAt) (*Mount, error) {
	v, body := readPlace(r, 0)
	if w, other := readPlace(r, 1); w > v {
		v, body = w, other
	}
	if v == 0 {
		return nil, errJournal
	}
	m := &Mount{}
	return m, json.Unmarshal(body, m)
}

// writeJournal writes a version of a mount, the newest from then on.
func writeJournal(f *os.File, m *Mount) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(body) > maxPacket {
		return fmt.Errorf("keeper: a journal of %d bytes, at most %d", len(body), maxPacket)
	}
	v, _ := readPlace(f, 0)
	place := 1
	if w, _ := readPlace(f, 1); w >= v {
		v, place = w, 0
	}
	p := make([]byte, journalHeader, journalHeader+len(body))
	binary.LittleEndian.PutUint64(p, v+1)
	binary.LittleEndian.PutUint32(p[8:], uint32(len(body)))
	sum := crc32.Update(crc32.ChecksumIEEE(p[:12]), crc32.IEEETable, body)
	binary.LittleEndian.PutUint32(p[12:], sum)
	_, err = f.WriteAt(append(p, body...), int64(place)*journalPlace)
	return err
}
