package main

import (
	"encoding/binary"
	"math/rand/v2"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/pool"
)

const (
	chunks = 1000    // of a round; 7919 has no divisor in common with it
	seals  = 1 << 20 // is added to a round's number for what is sealed in it
	sealed = 60      // chunks of that
)

// content returns bytes that depend on round and number alone: mostly one or
// two granules, now and then many.
func content(round, i int) []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(round))
	binary.LittleEndian.PutUint64(seed[8:], uint64(i))
	r := rand.NewChaCha8(seed)
	most := uint64(20_000)
	if i%50 == 0 {
		most = 200_000
	}
	b := make([]byte, 1+r.Uint64()%most)
	r.Read(b)
	return b
}

// entry is that of chunk i with its content.
func entry(i int, b []byte) pool.Entry {
	return pool.Entry{Digest: chunk.Sum(chunk.Algorithm(1+i%2), b), Size: uint32(len(b))}
}

func entries(round, n int) []pool.Entry {
	es := make([]pool.Entry, n)
	for i := range es {
		es[i] = entry(i, content(round, i))
	}
	return es
}
