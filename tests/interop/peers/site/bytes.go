package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
)

// generator yields the site's deterministic bytes: the little-endian 64-bit words of SplitMix64
// started at the seed. It never ends; wrap it in an io.LimitedReader.
type generator struct {
	state uint64
	word  [8]byte
	used  int
}

func newGenerator(seed uint64) *generator {
	return &generator{state: seed, used: 8}
}

// Read fills p and never fails.
func (g *generator) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		if g.used == len(g.word) {
			binary.LittleEndian.PutUint64(g.word[:], g.next())
			g.used = 0
		}
		copied := copy(p[n:], g.word[g.used:])
		g.used += copied
		n += copied
	}
	return n, nil
}

func (g *generator) next() uint64 {
	g.state += 0x9e3779b97f4a7c15
	z := g.state
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb
	return z ^ (z >> 31)
}

// summed is how many bytes came and their SHA-256 in hex.
type summed struct {
	N      int64  `json:"n"`
	SHA256 string `json:"sha256"`
}

// sumOf reads r to its end. What came before an error is in the result too.
func sumOf(r io.Reader) (summed, error) {
	hash := sha256.New()
	n, err := io.Copy(hash, r)
	return summed{N: n, SHA256: hex.EncodeToString(hash.Sum(nil))}, err
}
