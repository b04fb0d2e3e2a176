package model
import ("testing";"os";"bytes";"encoding/hex")
func TestZZ(t *testing.T){
 d,err:=newDevices(); if err!=nil{t.Fatal(err)}
 f,_:=os.Open(os.Getenv("TR")); tr,err:=readTrace(f); if err!=nil{t.Fatal(err)}
 g,err:=newGame(d,tr.setup); if err!=nil{t.Fatal(err)}
 a,_:=hex.DecodeString(os.Getenv("PA")); b,_:=hex.DecodeString(os.Getenv("PB"))
 for i,s:=range tr.steps{ j,err:=g.play(s); if err!=nil{t.Fatal(err)}; if j==nil{continue}
  if bytes.Contains(s.frame,a)&&bytes.Contains(s.frame,b) || bytes.Contains(j.r.out,a)&&bytes.Contains(j.r.out,b) { t.Logf("%d dev%d %s %v %v", i,s.device, j.e.why, j.e.verdicts, j.r); t.Logf("  %x -> %x", s.frame[:min(90,len(s.frame))],j.r.out[:min(90,len(j.r.out))])
   if c:=j.e.conversation;c!=nil{ t.Logf("   %+v gone %v %+v",c.tuple,c.mayBeGone, c.hops) } } }
}
