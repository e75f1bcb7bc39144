package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net"
	"time"
)

// newAuthority makes a CA for this process and a server certificate that it signed for hosts.
func newAuthority(hosts []string) (caPEM string, leaf *tls.Certificate, err error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", nil, err
	}
	ca := template("tbcontrol test CA")
	ca.IsCA = true
	ca.BasicConstraintsValid = true
	ca.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return "", nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", nil, err
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, serverTemplate(hosts), ca, leafKey.Public(), caKey)
	if err != nil {
		return "", nil, err
	}
	text := &bytes.Buffer{}
	if err := pem.Encode(text, &pem.Block{Type: "CERTIFICATE", Bytes: caDER}); err != nil {
		return "", nil, err
	}
	return text.String(), &tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: leafKey}, nil
}

// newPinned makes a self-signed certificate and the DERPNode.CertName that pins it.
// Source: Tailscale, tailcfg, DERPNode.CertName.
func newPinned(hosts []string) (cert *tls.Certificate, certName string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	self := serverTemplate(hosts)
	der, err := x509.CreateCertificate(rand.Reader, self, self, private.Public(), private)
	if err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(der)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, "sha256-raw:" + hex.EncodeToString(sum[:]), nil
}

func serverTemplate(hosts []string) *x509.Certificate {
	cert := template(hosts[0])
	cert.KeyUsage = x509.KeyUsageDigitalSignature
	cert.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			cert.IPAddresses = append(cert.IPAddresses, ip)
		} else {
			cert.DNSNames = append(cert.DNSNames, host)
		}
	}
	return cert
}

// template is valid from a day ago, so that a client whose clock is a little behind accepts it.
func template(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err)
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-24 * time.Hour),
		NotAfter:     time.Now().Add(30 * 24 * time.Hour),
	}
}
